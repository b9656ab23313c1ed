"""ICIIA-T written for the device, node by node: the same function in a fifth of the nodes.

With few pictures asked for and small groups, what a layer costs on a device is not arithmetic but
the number of its nodes. Three identities take most of them away; D is the width, m = D / P.

* A score is q . k. What of it does not depend on the key leaves the softmax as it was, so the keys'
  bias is dropped, and Wk moves over to the query: r = Wk' q, score = r . x. No key is projected.
* Weights of attention sum to one, so they may be applied before Wv: no value is projected either.
* Wk' Wq and, of the smallest groups, Wo Wv are again sparse: m and m^2 terms for each of D values.
  Terms are gathered, multiplied by their weights and summed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from cloud_server.training.iciia.gate import Gate
from cloud_server.training.iciia.module import Attention, GroupedLinear, Iciia, Layer
from export.network import OPSET

MOST_TERMS = 16  # m; above, matrix products are quicker
MOST_PRODUCTS = 4  # m^2 up to which values are projected in one step
_CONTRIB = "com.microsoft"  # onnxruntime's own operators
_IR_VERSION = 9

Array = NDArray[Any]


def fits(iciia: Iciia) -> bool:
    """Whether `write` can write this form: attention with the shuffle, and small groups."""
    config = iciia.config
    terms = config.width // config.groups
    return config.mixing == "attention" and config.shuffle and terms <= MOST_TERMS


def write(iciia: Iciia, gate: Gate, file: Path, longest: int) -> None:
    """Write features (B, D) and rows (n,) to logits (n, C) and gate (n,), 2 <= B <= `longest`."""
    graph = _Graph()
    *before, last = iciia.layers
    everything = "features"
    for i, layer in enumerate(before):
        everything = graph.layer(layer, f"layer{i}", everything, everything)
    asked = graph.node("Gather", everything, "rows", name="asked", axis=0)
    answer = graph.layer(last, "last", asked, everything)
    head = [graph.constant("head.weight", iciia.head.weight), "head.bias"]
    graph.constant("head.bias", iciia.head.bias)
    graph.node("Gemm", graph.node("Relu", answer, name="lit"), *head, name="logits", transB=1)
    graph.gate(gate, longest)
    graph.save(file, iciia.config.width, iciia.config.classes)


class _Graph:
    """Nodes and constants as they come; a node's name is that of its one output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: Tensor | Array) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(self, kind: str, *inputs: str, name: str, domain: str = "", **settings: Any) -> str:
        made = helper.make_node(kind, inputs, [name], name=name, domain=domain, **settings)
        self.nodes.append(made)
        return name

    def terms(self, name: str, x: str, source: Array, weight: Array) -> str:
        """Sum over s of weight[..., s, d] * x[:, source[..., s, d]]: (n, D) to (n, ..., D)."""
        where = self.constant(f"{name}.source", source.astype(np.int32))
        taken = self.node("Gather", x, where, name=f"{name}.taken", axis=1)
        by = self.constant(f"{name}.weight", weight.astype(np.float32))
        product = self.node("Mul", taken, by, name=f"{name}.product")
        axes = self.constant("terms", np.array([-2]))
        return self.node("ReduceSum", product, axes, name=name, keepdims=0)

    def normed(self, name: str, x: str, more: str, bias: Array, norm: torch.nn.LayerNorm) -> str:
        """LayerNorm of x + more + bias."""
        constants = (norm.weight, norm.bias, bias.astype(np.float32))
        names = [self.constant(f"{name}.{i}", value) for i, value in enumerate(constants)]
        return self.node(
            "SkipLayerNormalization", x, more, *names, name=name, domain=_CONTRIB, epsilon=norm.eps
        )

    def layer(self, layer: Layer, name: str, asked: str, everything: str) -> str:
        """Encode pictures (n, D) in the light of (B, D)."""
        attention = layer.mix
        assert isinstance(attention, Attention)
        heads, width = attention.heads, layer.norm1.weight.numel()
        source, weight, bias = _queries(attention)
        query = self.terms(f"{name}.turned", asked, source[None], weight)  # (n, H, D)
        shift = self.constant(f"{name}.shift", bias.astype(np.float32))
        query = self.node("Add", query, shift, name=f"{name}.query")
        score = self.node(
            "FusedMatMul", query, everything, name=f"{name}.score", domain=_CONTRIB, transB=1
        )
        share = self.node("Softmax", score, name=f"{name}.share", axis=-1)
        mixed = self.node("MatMul", share, everything, name=f"{name}.mixed")  # (n, H, D)
        flat = self.constant("flat", np.array([-1, heads * width]))
        mixed = self.node("Reshape", mixed, flat, name=f"{name}.flat")
        *steps, seen_by = _values(attention)
        for step in steps:
            mixed = self.terms(f"{name}.value", mixed, step.source, step.weight)
            value_bias = self.constant(f"{name}.value.bias", step.bias.astype(np.float32))
            mixed = self.node("Add", mixed, value_bias, name=f"{name}.values")
        seen, bias = self.terms(f"{name}.seen", mixed, seen_by.source, seen_by.weight), seen_by.bias
        x = self.normed(f"{name}.norm1", asked, seen, bias, layer.norm1)
        first, second = _Terms.of(layer.mlp1), _Terms.of(layer.mlp2)
        hidden = self.terms(f"{name}.mlp1", x, first.source, first.weight)
        hidden_bias = self.constant(f"{name}.mlp1.bias", first.bias.astype(np.float32))
        hidden = self.node("Add", hidden, hidden_bias, name=f"{name}.hidden")
        hidden = self.node("Relu", hidden, name=f"{name}.lit")
        more = self.terms(f"{name}.mlp2", hidden, second.source, second.weight)
        return self.normed(f"{name}.norm2", x, more, second.bias, layer.norm2)

    def gate(self, gate: Gate, longest: int) -> None:
        """Write `Gate.forward`; what depends on B alone is looked up."""
        centre = self.constant("centre", gate.centre)
        centred = self.node("Sub", "features", centre, name="centred")
        unit = self.node("LpNormalization", centred, name="unit", axis=-1, p=2)
        mean = self.node("ReduceMean", unit, self.constant("first", np.array([0])), name="mean")
        cosines = self.node("Gemm", mean, unit, name="cosines", transB=1)  # (1, B)
        own = self.node("Gather", cosines, "rows", name="own", axis=1)  # (1, n)
        crowd = self.node("ReduceMean", cosines, name="crowd", keepdims=0)
        by_own, by_crowd, by_share, constant = gate.weights.double().numpy()
        count = np.maximum(np.arange(longest + 1), 1)
        table = self.constant("by_count", (by_share / count + constant).astype(np.float32))
        pictures = self.node("Shape", "features", name="pictures", start=0, end=1)
        rest = self.node("Gather", table, pictures, name="rest")  # (1,)
        parts = [("own", own, by_own), ("crowd", crowd, by_crowd)]
        for name, value, weight in parts:
            scale = self.constant(f"{name}.scale", np.array([weight], np.float32))
            scaled = self.node("Mul", value, scale, name=f"{name}.scaled")
            rest = self.node("Add", scaled, rest, name=f"{name}.added")
        self.node("Reshape", rest, self.constant("row", np.array([-1])), name="gate")

    def save(self, file: Path, width: int, classes: int) -> None:
        def value(name: str, *shape: str | int, kind: int = TensorProto.FLOAT) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        graph = helper.make_graph(
            self.nodes,
            "iciia",
            [
                value("features", "pictures", width),
                value("rows", "rows", kind=TensorProto.INT64),
            ],
            [value("logits", "rows", classes), value("gate", "rows")],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        onnx.save(model, file)


class _Terms:
    """A grouped projection as terms: out[d] = sum_s weight[s, d] * x[source[s, d]] + bias[d]."""

    def __init__(self, source: Array, weight: Array, bias: Array) -> None:
        self.source, self.weight, self.bias = source, weight, bias

    @classmethod
    def of(cls, projection: GroupedLinear) -> _Terms:
        weight = projection.weight.detach().double().numpy()
        groups, m, _ = weight.shape
        o, p = np.divmod(np.arange(groups * m), groups)  # out[o * P + p]
        s = np.arange(m)[:, None]
        return cls(p * m + s, weight[p, o, s], projection.bias.detach().double().numpy())


def _queries(attention: Attention) -> tuple[Array, Array, Array]:
    """Return source (m, D), weight (H, m, D) and bias (H, D) of r = Wk' (Wq x + bq) / scale."""
    q, k = (y.weight.detach().double().numpy() for y in (attention.q, attention.k))
    groups, m, _ = q.shape
    width, heads = groups * m, attention.heads
    head = (np.arange(width) // (width // heads)).reshape(m, groups)  # of channel o * P + p
    inside = head == np.arange(heads)[:, None, None]  # (H, o, P)
    bias = attention.q.bias.detach().double().numpy().reshape(m, groups)
    scale = (width / heads) ** -0.5
    product = scale * np.einsum("hop,poi,poj->hpij", inside, k, q)
    shift = scale * np.einsum("hop,poi,op->hpi", inside, k, bias).reshape(heads, width)
    p, i = np.divmod(np.arange(width), m)
    j = np.arange(m)[:, None]
    return p * m + j, product[:, p, i, j], shift


def _values(attention: Attention) -> list[_Terms]:
    """Return Wo (Wv z + bv) + bo in one step or two; the first counts in z (H D,) of all heads."""
    v, out = _Terms.of(attention.v), _Terms.of(attention.out)
    width = v.bias.size
    v.source = v.source + width * (np.arange(width) // (width // attention.heads))
    if len(v.source) ** 2 > MOST_PRODUCTS:
        return [v, out]
    weight = v.weight[:, out.source] * out.weight  # (m, m, D)
    bias = (v.bias[out.source] * out.weight).sum(0) + out.bias
    return [_Terms(v.source[:, out.source].reshape(-1, width), weight.reshape(-1, width), bias)]
