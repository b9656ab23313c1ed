"""Sixteen bits for what learns, draws and judges here, where that is the faster way to compute."""

from __future__ import annotations

import torch

# What torch calls instructions for bfloat16: of x86 with AVX-512 and AMX, and of ARM.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def autocast(device: str | torch.device) -> torch.autocast:
    """Return a context of bfloat16 on `device`, or one that changes nothing.

    On a processor that has no instructions for it bfloat16 takes three times as long as 32 bits
    (the starter's UNets, AVX-512 without BF16), on one that has them half as long.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu" or _has_bfloat16())


def _has_bfloat16() -> bool:
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in INSTRUCTIONS)
