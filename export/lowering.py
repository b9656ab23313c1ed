"""Networks in lower precision than they were trained in, by onnxruntime's own tools.

Models over 2 GB pass through here: weights lie beside the graph in every file on the way, and no
graph is serialised with its weights inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import GraphProto, ModelProto, TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from export.errors import ExportError
from export.files import save_beside
from export.fused import write_standard
from export.gptq import Feeds, round_by_use
from export.optimise import BASIC, optimise
from export.precision import FP16, INT4, INT8

FLOAT = TensorProto.FLOAT
INT4_BLOCK = 32  # weights that share a scale
# Products that int8 leaves as they are: what is rounded first is rounded for all that follow. In a
# transformer these are the first layer's attention; of a small network, a sixth at most.
SPARED, SPARED_SHARE = 4, 1 / 6


class Unsuited(ExportError):
    """A component that cannot have a precision: it would change nothing, or everything."""


def lower(traced: Path, finished: Path, precision: str, calibration: Sequence[Feeds] = ()) -> None:
    """Write `traced` in another precision to `finished`, ready for the device.

    With `calibration`, inputs as they come in use, int8 is rounded by what it is used for.

    fp16 keeps 32-bit inputs and outputs and consists of standard operators, for the device to
    optimise for its GPU; the others are optimised for processors. Raises Unsuited.
    """
    finished.parent.mkdir(parents=True)
    with TemporaryDirectory(dir=finished.parent.parent) as workspace:
        folded, lowered = Path(workspace) / "folded.onnx", Path(workspace) / "lowered.onnx"
        if precision == FP16:
            standard = traced.with_name("standard.onnx")
            write_standard(traced, standard)
            optimise(standard, folded, BASIC)
            _halve(folded, finished)
            standard.unlink()
        else:
            optimise(traced, folded, BASIC)  # so that weights are constants, and types are known
            products = _products_only(folded)
            _QUANTISERS[precision](products, lowered)
            _refuse_unchanged(lowered)
            if precision == INT8 and calibration:
                round_by_use(products, lowered, calibration)
            optimise(lowered, finished)


def rounding(model: Path, copy: Path) -> None:
    """Write a copy of an fp16 `model` that rounds on a processor as a GPU does, to measure it.

    onnxruntime's CPU provider widens fp16 to 32 bits and leaves the rounding between two nodes
    out, but not where two nodes that move half floats as they are stand between them. `copy` shares
    the weights of `model`, which must lie beside it under the same name.
    """
    proto = onnx.load(model, load_external_data=False)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        names = [name for name in node.output if name]
        node.output[:] = [name and f"{name}/exact" for name in node.output]
        proto.graph.node.append(node)
        for name in names:
            for taken, given in ((f"{name}/exact", f"{name}/half"), (f"{name}/half", name)):
                proto.graph.node.append(onnx.helper.make_node("Identity", [taken], [given]))
    onnx.save(proto, copy)


def _halve(folded: Path, finished: Path) -> None:
    proto = onnx.load(folded, load_external_data=False)
    model = convert_float_to_float16(
        str(folded),
        keep_io_types=True,
        op_block_list=DEFAULT_OP_BLOCK_LIST,
        node_block_list=sorted(_feeding_waves(proto)),
    )
    _tidy(model.graph)
    save_beside(ONNXModel(model), finished)


def _tidy(graph: GraphProto) -> None:
    """Put right what onnxruntime's converter does around nodes that stay in 32 bits.

    It adds the same cast once for each reader of a tensor, and rounds between two such nodes.
    """
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    floats = {each.name for each in graph.input if each.type.tensor_type.elem_type == FLOAT}
    instead: dict[str, str] = {}
    for name, node in casts.items():
        before = casts.get(node.input[0])
        if before and name == f"{before.output[0]}_cast_to_fp32":
            exact = before.input[0]
            if exact in floats or exact == f"{before.output[0]}_cast_to_fp16":
                instead[name] = exact
    nodes = {node.output[0]: node for node in graph.node if node.output[0] not in instead}
    for node in nodes.values():
        node.input[:] = [instead.get(name, name) for name in node.input]
    kept = list(nodes.values())
    del graph.node[:]
    graph.node.extend(kept)


def _feeding_waves(proto: ModelProto) -> set[str]:
    """Return the nodes that a sine or cosine depends on, and those themselves.

    They embed timesteps and sizes of up to a thousand and more, at which half precision is a
    quarter off: that many radians.
    """
    makers = {output: node for node in proto.graph.node for output in node.output}
    found: set[str] = set()
    waiting = [node for node in proto.graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [makers[name] for name in node.input if name in makers]
    return found


def _to_int8(products: Path, lowered: Path) -> None:
    """Quantise matrix products: weights once by column, activations as they come."""
    graph = onnx.load(products, load_external_data=False).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    fixed = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in shapes]
    # onnxruntime takes no scale by column for a stack of matrices.
    stacked = [node for node in fixed if len(shapes[node.input[1]]) > 2]
    quantize_dynamic(
        products,
        lowered,
        nodes_to_exclude=[node.name for node in (*fixed[: _spared(len(fixed))], *stacked)],
        op_types_to_quantize=["MatMul"],  # onnxruntime has no fast kernel for convolutions
        weight_type=QuantType.QInt8,
        per_channel=True,
        # 7 bits of weights: with 8 processors without VNNI saturate, and the loss that is measured
        # here would not be theirs.
        reduce_range=True,
        use_external_data_format=True,
        # Of what comes out of its own operators onnxruntime infers no type here. It is all 32-bit.
        extra_options={"DefaultTensorType": FLOAT},
    )


def _spared(products: int) -> int:
    return min(SPARED, int(products * SPARED_SHARE))


def _to_int4(products: Path, lowered: Path) -> None:
    """Quantise the weights of matrix products in blocks; activations stay as they are."""
    quantizer = MatMulNBitsQuantizer(str(products), block_size=INT4_BLOCK)
    quantizer.process()
    save_beside(quantizer.model, lowered)


_QUANTISERS: dict[str, Callable[[Path, Path], None]] = {INT8: _to_int8, INT4: _to_int4}
_QUANTISED = {"MatMulInteger", "MatMulNBits"}


def _products_only(folded: Path) -> Path:
    """Write the model with Gemm as MatMul, which is what is quantised, and return its file."""
    model = ONNXModel(onnx.load(folded))
    model.replace_gemm_with_matmul()
    del model.graph().value_info[:]  # of before
    file = folded.with_name("products.onnx")
    save_beside(model, file)
    return file


def _refuse_unchanged(lowered: Path) -> None:
    nodes = onnx.load(lowered, load_external_data=False).graph.node
    if not any(node.op_type in _QUANTISED for node in nodes):
        raise Unsuited("it has no matrix products with fixed weights")
