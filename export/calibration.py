"""Networks that compute in 8 bits throughout: convolutions too, by ranges that are known before.

The ranges are those of what the device itself feeds the network while it draws in 32 bits, so that
family, scheduler, guidance and prompts are as in use. OpenVINO draws with the result in about
half the time on a processor with VNNI; onnxruntime's CPU provider runs it too, but no faster.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel

from edge_agent.bundle import Bundle, Component
from edge_agent.edge import Edge
from edge_agent.errors import GenerationError
from edge_agent.runtime.network import Backend, Engine, Shapes
from edge_agent.runtime.networks import Networks
from edge_agent.types import Cancellation, Provider, Request, Route
from export.errors import ExportError
from export.files import save_beside
from export.gptq import Feeds
from export.lowering import Unsuited

# Of a picture's steps so many at most; so many pictures that the denoiser is called some 32 times.
MOST_STEPS, CALLS = 8, 32
LEAST_PICTURES, MOST_PICTURES = 4, 16
CHECKED_PICTURES = 2  # more, by whose calls the loss is measured
SEED = 1000  # of the first picture: others than those that losses are measured on
PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Calls:
    """What a network was fed while pictures were drawn, and while others were, for comparison."""

    calibration: Sequence[Feeds]
    checks: Sequence[Feeds]


def record(bundle: Bundle, names: Collection[str], prompts: Sequence[str]) -> dict[str, Calls]:
    """Draw with `bundle` and return what its networks `names` are fed; raises ExportError."""
    steps = min(bundle.diffusion.steps, MOST_STEPS)
    pictures = min(max(CALLS // steps, LEAST_PICTURES), MOST_PICTURES)
    networks = _Recording(bundle, names)
    before: dict[str, int] = {}
    try:
        generator = Edge(networks).generator(time.monotonic)
        for i in range(pictures + CHECKED_PICTURES):
            if i == pictures:
                before = {name: len(calls) for name, calls in networks.calls.items()}
            request = Request(prompts[i % len(prompts)], steps=steps, route=Route.EDGE)
            generator.generate(request, {}, SEED + i)
    except GenerationError as err:
        raise ExportError(f"drawing to see what networks are fed fails: {err}") from err
    finally:
        networks.close()
    return {
        name: Calls(calls[: before[name]], calls[before[name] :])
        for name, calls in networks.calls.items()
    }


class _Recording(Networks):
    """A bundle's networks on the processor; keeps what those called `names` are fed."""

    def __init__(self, bundle: Bundle, names: Collection[str]) -> None:
        super().__init__(bundle, provider=Provider.CPU)
        self.calls: dict[str, list[Feeds]] = {name: [] for name in names}

    def start(self, part: Component, provider: Provider, shapes: Shapes | None) -> Engine:
        engine = super().start(part, provider, shapes)
        return _Recorded(engine, self.calls[part.name]) if part.name in self.calls else engine


class _Recorded:
    def __init__(self, engine: Engine, calls: list[Feeds]) -> None:
        self._engine, self._calls = engine, calls

    @property
    def inputs(self) -> Collection[str]:
        return self._engine.inputs

    @property
    def backend(self) -> Backend:
        return self._engine.backend

    def run(
        self, feeds: Mapping[str, NDArray], cancellation: Cancellation | None = None
    ) -> list[NDArray]:
        self._calls.append({name: np.array(feed, np.float32) for name, feed in feeds.items()})
        return self._engine.run(feeds, cancellation)


def quantise(unfused: Path, finished: Path, calls: Sequence[Feeds]) -> None:
    """Write `unfused` with weights and activations of its products in 8 bits to `finished`.

    `unfused` is as it was traced: where onnxruntime has fused an activation already, OpenVINO does
    not see that it could. Holds the network some four times in memory. Raises Unsuited when it has
    no products to quantise.
    """
    products = _products(onnx.load(unfused, load_external_data=False).graph)
    if not products:
        raise Unsuited("it has no convolutions or matrix products but those that stay in 32 bits")
    finished.parent.mkdir(parents=True)
    with TemporaryDirectory(dir=finished.parent.parent) as workspace:
        lowered = Path(workspace) / "lowered.onnx"
        quantize_static(
            unfused,
            lowered,
            _Reader(calls),
            op_types_to_quantize=list(PRODUCTS),
            nodes_to_quantize=products,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # 7 bits of weights, for the reason that int8 has
            use_external_data_format=True,
            extra_options={
                "DefaultTensorType": TensorProto.FLOAT,
                # What comes out is added up in 32 bits, and stays so.
                "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
                "QuantizeBias": False,
            },
        )
        model = ONNXModel(onnx.load(lowered))
        _count_from_zero(model)
        save_beside(model, finished)


def _count_from_zero(model: ONNXModel) -> None:
    """Have convolutions take their 8 bits as they are, not as differences from a zero point.

    The same function: what is padded is the zero point then, and what a convolution makes of it
    leaves with the bias. With zero points OpenVINO takes two to three times as long to open the
    network, at each start.
    """
    graph, makers = model.graph(), model.output_name_to_node()
    constants = {tensor.name: tensor for tensor in graph.initializer}
    before: set[str] = set()

    def value_of(name: str) -> NDArray:
        return numpy_helper.to_array(constants[name])

    def constant(name: str, value: NDArray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for conv in [node for node in graph.node if node.op_type == "Conv"]:
        read, weights = makers.get(conv.input[0]), makers.get(conv.input[1])
        if read is None or weights is None or read.op_type != "DequantizeLinear":
            continue
        before.add(read.output[0])
        (bits, scale, zero), own = read.input, conv.input[2:]
        pads = next((each.ints for each in conv.attribute if each.name == "pads"), None)
        if pads and any(pads):
            half = len(pads) // 2
            around = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
            pads[:] = [0] * len(pads)
            padded = [bits, constant(f"{conv.name}/around", around), zero]
            bits = f"{conv.name}/padded"
            graph.node.append(helper.make_node("Pad", padded, [bits]))
        counted = [bits, scale, constant(f"{conv.name}/zero", np.zeros_like(value_of(zero)))]
        values = f"{conv.name}/values"
        graph.node.append(helper.make_node("DequantizeLinear", counted, [values]))
        integers, scales = map(value_of, weights.input[:2])
        sums = integers.sum(tuple(range(1, integers.ndim)), np.int64) * scales
        bias = (value_of(own[0]) if own else 0) - sums * value_of(scale) * value_of(zero)
        biased = constant(f"{conv.name}/bias", bias.astype(np.float32))
        conv.input[:] = [values, conv.input[1], biased]
    readers = model.input_name_to_nodes()
    model.remove_nodes([makers[name] for name in before if name not in readers])
    model.clean_initializers()


class _Reader(CalibrationDataReader):
    def __init__(self, calls: Sequence[Feeds]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> Feeds | None:
        return next(self._calls, None)


def _products(graph: GraphProto) -> list[str]:
    """Return the products that take time: those of what comes from the first input, the latents.

    Of text and of timesteps there is little to compute. The first and the last product, which see
    and make the picture, stay in 32 bits; so do those that read what norms and skips read too, the
    sum of all that was before: its range is the widest, and few products read it.
    """
    weights = {weight.name for weight in graph.initializer}
    readers = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    # Of a decoder the sums of residuals read the rounded values too, which costs little.
    alike = {*PRODUCTS, "Add", "Shape"}
    drawn = {graph.input[0].name}
    found = []
    for node in graph.node:
        # The batch that timesteps are repeated for is no part of the picture.
        if node.op_type != "Shape" and drawn & set(node.input):
            drawn |= set(node.output)
            if node.op_type in PRODUCTS and node.input[1] in weights and node.input[0] in drawn:
                found.append(node)
    return [node.name for node in found[1:-1] if readers[node.input[0]] <= alike]
