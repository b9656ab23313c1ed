"""Blocks of diffusers' UNets written for devices: attention as one node, and GEGLU in two halves.

The same functions of the same weights. A processor runs onnxruntime's own attention piece by piece:
at 4,096 tokens the matrix of all with all, which plain nodes hold, is 335 MB for five heads. Two
products in the place of one that is cut spare the copies of its halves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from cloud_server.torchvision_guard import guard

guard()
from diffusers import UNet2DConditionModel  # noqa: E402  after the guard
from diffusers.models.activations import GEGLU  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: E402

_DOMAIN, _KIND = "com.microsoft", "MultiHeadAttention"


def fuse(unet: UNet2DConditionModel) -> None:
    """Put these blocks in the place of diffusers' own; what is none of the plain kind stays."""
    unet.set_attn_processor(
        {
            name: FusedAttention() if isinstance(own, AttnProcessor | AttnProcessor2_0) else own
            for name, own in unet.attn_processors.items()
        }
    )
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, GEGLU):
                setattr(module, name, SplitGeglu(child))


class FusedAttention:
    """diffusers' `AttnProcessor2_0` without masks, (B, n, d) to the same, traced as one node."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        mixed: Tensor = _MultiHead.apply(query, key, value, attn.heads, attn.scale)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed


class _MultiHead(torch.autograd.Function):
    """Attention of (B, n, d) over (B, m, d): in torch its own, in ONNX onnxruntime's node."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float
    ) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return mixed.transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, heads: int, scale: float) -> Any:
        kind = f"{_DOMAIN}::{_KIND}"
        node = g.op(kind, query, key, value, num_heads_i=heads, scale_f=scale)
        return node.setType(query.type())


class SplitGeglu(nn.Module):
    """GEGLU (Shazeer 2020) whose one projection, of values and gates, is two."""

    def __init__(self, whole: GEGLU) -> None:
        super().__init__()
        projection = whole.proj
        self.value, self.gate = (
            nn.Linear(projection.in_features, projection.out_features // 2, device="meta")
            for _ in range(2)
        )
        for name in ("weight", "bias"):
            first, second = getattr(projection, name).chunk(2)
            setattr(self.value, name, nn.Parameter(first, requires_grad=False))
            setattr(self.gate, name, nn.Parameter(second, requires_grad=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.value(hidden_states) * functional.gelu(self.gate(hidden_states))


def write_standard(traced: Path, standard: Path) -> None:
    """Write `traced` with attention in standard operators, for providers without onnxruntime's.

    `standard` lies beside it and shares its weights, if those lie in files of their own.
    """
    proto = onnx.load(traced, load_external_data=False)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        fused = node.op_type == _KIND and node.domain == _DOMAIN
        proto.graph.node.extend(_in_standard(node, proto.graph) if fused else [node])
    onnx.save(proto, standard)


def _in_standard(node: NodeProto, graph: onnx.GraphProto) -> list[NodeProto]:
    settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    name, (query, key, value), (mixed,) = node.output[0], node.input, node.output

    def constant(what: str, array: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.{what}"))
        return f"{name}.{what}"

    made: list[NodeProto] = []

    def step(kind: str, *inputs: str, out: str, **more: Any) -> str:
        made.append(helper.make_node(kind, inputs, [out], name=out, **more))
        return out

    def heads(x: str, what: str, perm: tuple[int, ...]) -> str:
        cut = step("Reshape", x, by_head, out=f"{name}.{what}.cut")
        return step("Transpose", cut, out=f"{name}.{what}.heads", perm=perm)

    by_head = constant("by_head", np.array([0, 0, settings["num_heads"], -1]))
    scale = constant("scale", np.array(settings["scale"], np.float32))
    q = heads(step("Mul", query, scale, out=f"{name}.scaled"), "query", (0, 2, 1, 3))
    k, v = heads(key, "key", (0, 2, 3, 1)), heads(value, "value", (0, 2, 1, 3))
    share = step("Softmax", step("MatMul", q, k, out=f"{name}.score"), out=f"{name}.share", axis=-1)
    seen = step("MatMul", share, v, out=f"{name}.seen")
    rows = step("Transpose", seen, out=f"{name}.rows", perm=(0, 2, 1, 3))
    step("Reshape", rows, constant("whole", np.array([0, 0, -1])), out=mixed)
    return made
