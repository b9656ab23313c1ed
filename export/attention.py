"""ICIIA-T written for the device, node by node: the same function in fewer nodes.

With few pictures asked for and small groups, what a layer costs on a device is not arithmetic but
the number of its nodes. Three identities take most of them away; D is the width, m = D / P.

* A score is q . k. What of it does not depend on the key leaves the softmax as it was, so the keys'
  bias is dropped, and Wk moves over to the query: r = Wk' q, score = r . x. No key is projected.
* Weights of attention sum to one, so they may be applied before Wv: no value is projected either.
* Wk' Wq is of P blocks again. Blocks of a projection are one batched product, a row at a time: few
  rows are asked for. A product spread out and summed took up to twice as long, one whole matrix up
  to a third longer.
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

from cloud_server.training.iciia.module import Attention, GroupedLinear, Iciia, Layer
from export.network import OPSET

MOST_TERMS = 64  # m; of wider groups this form was not tried
_CONTRIB = "com.microsoft"  # onnxruntime's own operators
_IR_VERSION = 9

Array = NDArray[Any]


def fits(iciia: Iciia) -> bool:
    """Whether `write` can write this form: one layer of attention, shuffled, with small groups.

    Of more layers all but the last are asked for every picture.
    """
    config = iciia.config
    terms = config.width // config.groups
    by_head = terms % config.heads == 0  # a head's channels o * P + p are those of whole o
    small = config.layers == 1 and terms <= MOST_TERMS
    return config.mixing == "attention" and config.shuffle and by_head and small


def write(iciia: Iciia, file: Path) -> None:
    """Write earlier features (k, D) and new ones (n, D) to the logits (n, C) of the new ones."""
    graph = _Graph()
    (layer,) = iciia.stack
    graph.node("Concat", "before", "features", name="all", axis=0)
    answer = graph.layer(layer, "features")
    head = [graph.constant("head.weight", iciia.head.weight), "head.bias"]
    graph.constant("head.bias", iciia.head.bias)
    graph.node("Gemm", graph.node("Relu", answer, name="lit"), *head, name="logits", transB=1)
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

    def blocks(
        self,
        name: str,
        x: str,
        cut: tuple[int, ...],
        weight: Array,
        whole: tuple[int, ...],
        turned: tuple[int, ...] = (),
    ) -> str:
        """Multiply x, seen as rows (n, *cut, 1, i), by `weight` (..., i, o); see it as (n, *whole).

        In between axes are put in the order `turned`.
        """
        inside = weight.shape[-2]
        constants = [np.array((-1, *cut, 1, inside)), weight.astype(np.float32), (-1, *whole)]
        cut_, by, whole_ = (
            self.constant(f"{name}.{kind}", np.array(value))
            for kind, value in zip(("cut", "weight", "whole"), constants, strict=True)
        )
        rows = self.node("Reshape", x, cut_, name=f"{name}.rows")
        product = self.node("MatMul", rows, by, name=f"{name}.product")
        if turned:
            product = self.node("Transpose", product, name=f"{name}.turned", perm=turned)
        return self.node("Reshape", product, whole_, name=name)

    def projected(self, name: str, x: str, projection: GroupedLinear) -> str:
        """Project (n, D) to the same, without the bias."""
        weight = _exact(projection.weight)  # (P, o, i)
        groups, m, _ = weight.shape
        by_row = weight.transpose(0, 2, 1)
        return self.blocks(name, x, (groups,), by_row, (groups * m,), turned=(0, 3, 1, 2))

    def shifted(self, name: str, x: str, bias: Tensor | Array) -> str:
        """Add a bias."""
        shift = bias.detach() if isinstance(bias, Tensor) else bias.astype(np.float32)
        return self.node("Add", x, self.constant(f"{name}.shift", shift), name=name)

    def normed(self, name: str, x: str, more: str, bias: Tensor, norm: torch.nn.LayerNorm) -> str:
        """LayerNorm of x + more + bias."""
        constants = (norm.weight, norm.bias, bias)
        names = [self.constant(f"{name}.{i}", value) for i, value in enumerate(constants)]
        return self.node(
            "SkipLayerNormalization", x, more, *names, name=name, domain=_CONTRIB, epsilon=norm.eps
        )

    def layer(self, layer: Layer, asked: str) -> str:
        """Encode the pictures `asked` for (n, D) in the light of all features (k + n, D)."""
        attention = layer.mix
        assert isinstance(attention, Attention)
        heads, width = attention.heads, layer.norm1.weight.numel()
        groups, m, _ = attention.q.weight.shape
        weight, bias = _queries(attention)
        turned = self.blocks("turned", asked, (1, groups), weight, (heads, width))
        query = self.shifted("query", turned, bias)  # (n, H, D)
        score = self.node("FusedMatMul", query, "all", name="score", domain=_CONTRIB, transB=1)
        share = self.node("Softmax", score, name="share", axis=-1)
        mixed = self.node("MatMul", share, "all", name="mixed")  # (n, H, D)
        by_head = _exact(attention.v.weight).reshape(groups, heads, -1, m).transpose(1, 0, 3, 2)
        seen = self.blocks("seen", mixed, (heads, groups), by_head, (width,), (0, 1, 4, 2, 3))
        value = self.shifted("value", seen, attention.v.bias)
        out = self.projected("out", value, attention.out)
        x = self.normed("norm1", asked, out, attention.out.bias, layer.norm1)
        hidden = self.shifted("hidden", self.projected("mlp1", x, layer.mlp1), layer.mlp1.bias)
        lit = self.node("Relu", hidden, name="hidden.lit")
        more = self.projected("mlp2", lit, layer.mlp2)
        return self.normed("norm2", x, more, layer.mlp2.bias, layer.norm2)

    def save(self, file: Path, width: int, classes: int) -> None:
        def value(name: str, *shape: str | int) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "iciia",
            [
                value("before", "earlier", width),
                value("features", "new", width),
            ],
            [value("logits", "new", classes)],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        onnx.save(model, file)


def _exact(weight: Tensor) -> Array:
    return weight.detach().double().numpy()


def _queries(attention: Attention) -> tuple[Array, Array]:
    """Return weight (H, P, i, o) and bias (H, D) of r = Wk' (Wq x + bq) / scale, by head."""
    q, k = _exact(attention.q.weight), _exact(attention.k.weight)
    groups, m, _ = q.shape
    heads = attention.heads
    inside = np.arange(m) // (m // heads) == np.arange(heads)[:, None]  # (H, o): head of o * P + p
    scale = (groups * m / heads) ** -0.5
    weight = scale * np.einsum("ho,poi,poj->hpji", inside, k, q)
    bias = _exact(attention.q.bias).reshape(m, groups)
    shift = scale * np.einsum("ho,poi,op->hpi", inside, k, bias)
    return weight, shift.reshape(heads, -1)
