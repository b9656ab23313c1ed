"""Weights rounded by what their products are used for: GPTQ (Frantar et al. 2023, section 3).

Rounding every weight to the nearest step makes errors that the inputs of a product, which go
together, add up. Here each error is made up for by the weights that are still to be rounded, as the
second moments of the inputs say. The files that onnxruntime quantised keep their scales and
operators; only integers change. In two products of the starter's text encoder, whose answers
decide where to draw, a fifth and a tenth of the squared error were left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from export.files import save_beside
from export.parity import open_plainly

Floats = NDArray[np.float64]
Feeds = Mapping[str, NDArray]

DAMPING = 0.01  # of the mean second moment, for inputs that hardly ever vary
BLOCK = 128  # weights of a column whose errors are handed on together
MOST_BYTES = 2**30  # of second moments at once
BATCH = 16  # inputs that are summed up at once: wide products take a ninth of the time by it
WIDEST = 4096  # inputs of a product; wider ones, which would take minutes each, stay as they are


def round_by_use(products: Path, lowered: Path, calibration: Sequence[Feeds]) -> None:
    """Round the weights of `lowered` anew, by what its products in full, `products`, are given.

    `lowered` is what onnxruntime's dynamic quantisation made of `products`: symmetric, by column.
    """
    full = onnx.load(products)
    weights = {each.name: each for each in full.graph.initializer}
    model = onnx.load(lowered)
    integers = {each.name: each for each in model.graph.initializer}
    quantised = [
        node
        for node in full.graph.node
        if node.op_type == "MatMul"
        and f"{node.input[1]}_quantized" in integers
        and weights[node.input[1]].dims[0] <= WIDEST
    ]
    for node, moments in _second_moments(full, products, quantised, calibration):
        name = node.input[1]
        whole = numpy_helper.to_array(weights[name]).astype(np.float64)
        scale = numpy_helper.to_array(integers[f"{name}_scale"]).astype(np.float64)
        given = integers[f"{name}_quantized"]
        nearest = numpy_helper.to_array(given)
        rounded = round_columns(whole, scale, moments, int(np.abs(nearest).max()))
        given.CopyFrom(numpy_helper.from_array(rounded.astype(nearest.dtype), given.name))
    save_beside(ONNXModel(model), lowered)


def round_columns(weight: Floats, scale: Floats, moments: Floats, most: int) -> Floats:
    """Return integers (K, N), at most `most` in size, that times `scale` (N,) are near `weight`.

    Near is what little changes x W for inputs x of these second `moments` (K, K).
    """
    count = len(weight)
    order = np.argsort(-moments.diagonal(), kind="stable")  # the most used are rounded first
    damped = moments[np.ix_(order, order)]
    damped[np.diag_indices(count)] += DAMPING * damped.diagonal().mean() + np.finfo(float).tiny
    made_up = _root_of_inverse(damped)  # row i: by whom, for the error of i
    left, rounded = weight[order], np.empty_like(weight)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.empty((stop - start, weight.shape[1]))
        for i in range(start, stop):
            rounded[order[i]] = whole = (left[i] / scale).round().clip(-most, most)
            errors[i - start] = error = (left[i] - whole * scale) / made_up[i, i]
            left[i + 1 : stop] -= np.outer(made_up[i, i + 1 : stop], error)
        left[stop:] -= made_up[start:stop, stop:].T @ errors
    return rounded


def _root_of_inverse(matrix: Floats) -> Floats:
    """Return the upper triangle R, R^T R the inverse of `matrix`, in less than half of its time.

    With `matrix` = U U^T, by the Cholesky factor of its rows and columns in reverse, R is U^-1.
    """
    upper = torch.linalg.cholesky(torch.from_numpy(matrix).flip(0, 1)).flip(0, 1)
    unit = torch.eye(len(matrix), dtype=upper.dtype)
    root: Floats = torch.linalg.solve_triangular(upper, unit, upper=True).numpy()
    return root


def _second_moments(
    full: onnx.ModelProto,
    products: Path,
    nodes: Sequence[NodeProto],
    calibration: Sequence[Feeds],
) -> Iterator[tuple[NodeProto, Floats]]:
    """Yield each product with the second moments (K, K) of its inputs, some products at a time."""
    shapes = {each.name: each.dims for each in full.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        readers.setdefault(node.input[0], []).append(node)
    inputs = {name: shapes[several[0].input[1]][0] for name, several in readers.items()}
    for names in _parts(inputs):
        moments = {name: np.zeros((inputs[name], inputs[name])) for name in names}
        session = open_plainly(_telling(products, names))
        for feeds in _batches(calibration):
            for name, given in zip(names, session.run(names, feeds), strict=True):
                rows = given.reshape(-1, given.shape[-1]).astype(np.float64)
                moments[name] += rows.T @ rows
        for name in names:
            for node in readers[name]:
                yield node, moments[name]


def _batches(calibration: Sequence[Feeds]) -> Iterator[dict[str, NDArray]]:
    """Yield inputs of the same shapes together, along their first axis."""
    alike: dict[tuple[tuple[int, ...], ...], list[Feeds]] = {}
    for feeds in calibration:
        alike.setdefault(tuple(value.shape for value in feeds.values()), []).append(feeds)
    for several in alike.values():
        for start in range(0, len(several), BATCH):
            batch = several[start : start + BATCH]
            yield {name: np.concatenate([feeds[name] for feeds in batch]) for name in batch[0]}


def _parts(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Part names so that their second moments take at most MOST_BYTES, if any two do."""
    part: list[str] = []
    total = 0
    for name, width in widths.items():
        if part and total + 8 * width**2 > MOST_BYTES:
            yield part
            part, total = [], 0
        part.append(name)
        total += 8 * width**2
    if part:
        yield part


def _telling(products: Path, names: Sequence[str]) -> Path:
    """Write the model that also gives the values `names`, beside the same weights."""
    proto = onnx.load(products, load_external_data=False)
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    file = products.with_name("telling.onnx")
    onnx.save(proto, file)
    return file
