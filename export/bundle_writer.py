"""Write a bundle so that it is there whole or not at all, and unchanged parts are not made again.

Everything is written to `<out>.partial`, which a killed export leaves for the next one to go on
from, and renamed at the end; until then an earlier bundle stays as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge_agent.bundle import MANIFEST, Bundle, Component, Loss, Parity, open_bundle
from edge_agent.verified import FileRecord
from export.errors import ExportError
from export.files import empty, file_sha256, hold, link

DONE = "components.json"  # in the partial folder: which components are finished
MODEL = "model.onnx"
ROUTER_TEXT = "text_encoder"  # the router's, and the denoiser's where they are one
DIFFUSION_TEXTS = ("text_encoder_diffusion", "text_encoder_diffusion_2")
DECODER, PREVIEW_DECODER = "vae_decoder", "preview_decoder"
CRITIC, CRITIC_TEXT = "critic", "text_encoder_critic"
TEXT_ENCODERS = (ROUTER_TEXT, *DIFFUSION_TEXTS)
RECOGNIZER = ("recognizer_backbone", "recognizer_head", "recognizer_adapted")
DRAWING = ("unet", "transformer", DECODER, PREVIEW_DECODER)
COMPONENTS = (*TEXT_ENCODERS, CRITIC_TEXT, "predictor", CRITIC, *DRAWING, *RECOGNIZER)


def tokenizer_file(component: str) -> str:
    """Return where a text encoder's tokenizer lies: `tokenizer.json` is the router's."""
    return component.replace(ROUTER_TEXT, "tokenizer") + ".json"


SENSITIVITY = "sensitivity.json"  # what `--sensitivity` found, for whoever chooses
OURS = {
    MANIFEST,
    DONE,
    SENSITIVITY,
    *COMPONENTS,
    *map(tokenizer_file, (*TEXT_ENCODERS, CRITIC_TEXT)),
}


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss of each lowered component alone, and of all of them together."""

    each: Mapping[str, Loss]
    together: Loss


class BundleWriter:
    """A bundle in the making; `fresh` forgets earlier and half-finished ones.

    Raises ExportError when `out` holds anything that is not a bundle's, or another export writes
    there, OSError when it cannot be written. `close` lets others write.
    """

    def __init__(self, out: Path, *, fresh: bool = False) -> None:
        self.out = out.expanduser().resolve()
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._old = self.out.with_name(self.out.name + ".old")
        if self._old.exists() and not self.out.exists():  # killed between the two renames
            self._old.rename(self.out)
        _refuse_foreign(self.out)
        # Held as long as there is a writer, or two would write into each other's files.
        self.close = weakref.finalize(self, os.close, hold(self.partial))
        if fresh:
            empty(self.partial)
        earlier = {} if fresh else _read_components(self.out / MANIFEST, "components")
        self._earlier = {name: (self.out, component) for name, component in earlier.items()}
        self._done = _read_components(self.partial / DONE, None)
        self._earlier |= {name: (self.partial, each) for name, each in self._done.items()}

    def keep(self, name: str, source: str) -> Component | None:
        """Take over a component that was made from the same source before and is undamaged."""
        if name not in self._earlier:
            return None
        folder, component = self._earlier[name]
        if component.source != source or not _is_intact(folder, component):
            return None
        if folder != self.partial:
            shutil.rmtree(self.partial / name, ignore_errors=True)
            for relative in component.files:
                link(folder / relative, self.partial / relative)
            self._record(component)
        return component

    def workspace(self, name: str) -> Path:
        """Return an empty folder for files on the way to component `name`."""
        folder = self.partial / f"{name}.work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def add(
        self,
        name: str,
        finished: Path,
        *,
        opset: int,
        precision: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        parity: Parity,
        source: str,
        optimized: bool,
        loss: Loss | None,
    ) -> Component:
        """Make the folder `finished`, inside a workspace, component `name`, and record it."""
        target = self.partial / name
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
        files = {f"{name}/{file.name}": _record_of(file) for file in sorted(target.iterdir())}
        component = Component(
            name=name,
            file=f"{name}/{MODEL}",
            files=files,
            opset=opset,
            precision=precision,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            parity=parity,
            source=source,
            optimized=optimized,
            loss=loss,
        )
        self._record(component)
        return component

    def discard(self, workspace: Path) -> None:
        """Remove a workspace and what is left in it."""
        shutil.rmtree(workspace)

    def add_file(self, name: str, text: str) -> FileRecord:
        """Write a small text file of the bundle and return its record."""
        _write(self.partial / name, text)
        return _record_of(self.partial / name)

    def losses(self, source: str) -> Losses | None:
        """Return what an earlier export measured of the same source."""
        try:
            content = json.loads((self.out / MANIFEST).read_text(encoding="utf-8"))
            if content["loss"]["source"] != source:
                return None
            each = {name: entry.get("loss") for name, entry in content["components"].items()}
            return Losses(
                {name: _loss_of(loss) for name, loss in each.items() if loss},
                _loss_of(content["loss"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def preview(self, components: Mapping[str, Component], manifest: Mapping[str, Any]) -> Bundle:
        """Open the unfinished bundle as if these components were all of it."""
        self._write_manifest(components, manifest)
        return open_bundle(self.partial, verify=False)

    def finish(
        self,
        components: Sequence[Component],
        manifest: Mapping[str, Any],
        reports: Sequence[str] = (),
    ) -> Path:
        """Write the manifest last, open the result as the device does, and put it in place.

        `reports` are files of `add_file` that the manifest does not name.
        """
        tokenizers = {entry["file"] for entry in manifest["tokenizers"].values()}
        wanted = {component.name for component in components} | tokenizers | {DONE, *reports}
        for stray in self.partial.iterdir():
            if stray.is_dir() and stray.name not in wanted:
                shutil.rmtree(stray)
            elif stray.name not in wanted:
                stray.unlink()
        self._write_manifest({component.name: component for component in components}, manifest)
        open_bundle(self.partial)
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.out.rename(self._old)
        self.partial.rename(self.out)
        (self.out / DONE).unlink()
        shutil.rmtree(self._old, ignore_errors=True)
        return self.out

    def _write_manifest(
        self, components: Mapping[str, Component], manifest: Mapping[str, Any]
    ) -> None:
        written = {name: _to_json(component) for name, component in components.items()}
        _write(self.partial / MANIFEST, dump({**manifest, "components": written}))

    def _record(self, component: Component) -> None:
        self._done[component.name] = component
        _write(self.partial / DONE, dump({name: _to_json(c) for name, c in self._done.items()}))


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ExportError(f"the output '{out}' is a file; pass a folder with -o")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in OURS) if out.exists() else []
    if foreign:
        raise ExportError(
            f"the output folder '{out}' holds '{foreign[0]}', which is no part of a bundle, and "
            "would be replaced; pass another folder with -o"
        )


def _read_components(file: Path, key: str | None) -> dict[str, Component]:
    """Read what an earlier export recorded; a missing or damaged file means: make it again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = content[key] if key else content
        return {name: _from_json(name, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _to_json(component: Component) -> dict[str, Any]:
    entry = asdict(component)
    del entry["name"]
    if component.loss is None:
        del entry["loss"]
    return entry


def _from_json(name: str, entry: Mapping[str, Any]) -> Component:
    known = {
        "files": {path: FileRecord(**record) for path, record in entry["files"].items()},
        "inputs": tuple(entry["inputs"]),
        "outputs": tuple(entry["outputs"]),
        "parity": Parity(**entry["parity"]),
        "loss": _loss_of(entry["loss"]) if entry.get("loss") else None,
    }
    return Component(name=name, **{**entry, **known})


def _loss_of(entry: Mapping[str, Any]) -> Loss:
    return Loss(**{field.name: entry[field.name] for field in fields(Loss)})


def _is_intact(folder: Path, component: Component) -> bool:
    try:
        return all(_record_of(folder / path) == record for path, record in component.files.items())
    except OSError:
        return False


def _record_of(file: Path) -> FileRecord:
    return FileRecord(file_sha256(file), file.stat().st_size)


def dump(content: Mapping[str, Any]) -> str:
    """Return JSON as bundles have it."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
