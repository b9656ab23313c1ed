"""Which component is written in which precision, as `--precision` says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from export.bundle_writer import DECODER, DIFFUSION_TEXTS, TEXT_ENCODERS
from export.errors import ExportError

FP32, FP16, W8A8, INT8, INT4 = "fp32", "fp16", "w8a8", "int8", "int4"
PRECISIONS = (FP32, FP16, W8A8, INT8, INT4)
NOT_DRAWN = "its ranges are not those of pictures"
DENOISER = "denoiser"  # in `--precision`: whichever the family has


@dataclass(frozen=True, slots=True)
class Precisions:
    """One precision for what holds most weights and bears it, and others by component.

    That are the denoiser and the text encoders that it and the router read. Decoders overflow in
    fp16 in some families and hold convolutions, which int8 and int4 leave, what a critic loses is
    not counted in decisions, and the rest is small: those are lowered by name alone. w8a8 is for
    denoiser and decoder, and for nothing else; text encoders that decide nothing go with it in
    int8, which rounds their activations as they come.
    """

    usual: str = FP32
    named: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Precisions:
        """Read `int8`, `unet=fp16,text_encoder=int8`, or both kinds; raises ValueError."""
        usual: str | None = None
        named: dict[str, str] = {}
        for each in text.split(","):
            component, equals, precision = (word.strip() for word in each.rpartition("="))
            if precision not in PRECISIONS:
                raise ValueError(f"'{precision}' is none of {', '.join(PRECISIONS)}")
            if (component in named) if equals else (usual is not None):
                raise ValueError(f"'{text}' names {component or 'the usual precision'} twice")
            if equals:
                named[component] = precision
            else:
                usual = precision
        return cls(usual or FP32, named)

    def of(self, components: Collection[str], denoiser: str) -> dict[str, str]:
        """Return the precision of each component; raises ExportError for one that is not there."""
        named = {denoiser if name == DENOISER else name: p for name, p in self.named.items()}
        unknown = sorted(named.keys() - set(components))
        if unknown:
            raise ExportError(
                f"--precision names '{unknown[0]}', which this bundle will not have; "
                f"its components are {', '.join(components)}"
            )
        drawing = drawn(denoiser)
        for name, precision in named.items():
            if precision == W8A8 and name not in drawing:
                raise unsuited(name, W8A8, NOT_DRAWN)
        if self.usual == W8A8:
            usual = dict.fromkeys(drawing, W8A8) | dict.fromkeys(DIFFUSION_TEXTS, INT8)
        else:
            usual = dict.fromkeys((*TEXT_ENCODERS, denoiser), self.usual)
        return {name: named.get(name, usual.get(name, FP32)) for name in components}


def drawn(denoiser: str) -> tuple[str, str]:
    """Return the components whose ranges are seen by drawing, as w8a8 needs."""
    return denoiser, DECODER


def unsuited(component: str, precision: str, why: str) -> ExportError:
    """Return the error for a component that cannot have the precision which was asked for."""
    return ExportError(
        f"the {component} cannot be written in {precision}: {why}; "
        f"leave it as it is, with --precision {component}={FP32}"
    )
