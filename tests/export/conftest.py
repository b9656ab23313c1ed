"""One real export of the tiny models, interrupted once, that all tests of this folder share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from export.build import Job, Row, Stage, export_bundle
from export.sources import open_pipeline, open_router
from tests import tiny


@dataclass(frozen=True, slots=True)
class Exported:
    """The bundle, what it was made from, and what the interruption left behind."""

    job: Job
    path: Path
    rows: list[Row]
    left_behind: list[str]
    existed_after_interruption: bool


def interrupt_at(component: str):
    """Return a listener that stops an export where `component` would begin."""

    def listen(stage: Stage) -> None:
        if stage.component == component:
            raise KeyboardInterrupt

    return listen


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export")
    job = Job(
        pipeline=open_pipeline(str(tiny.make_pipeline(folder / "tiny"))),
        router=open_router(tiny.make_router(folder / "router")),
        out=folder / "bundle",
    )
    with pytest.raises(KeyboardInterrupt):
        export_bundle(job, interrupt_at("unet"))
    left_behind = sorted(path.name for path in (folder / "bundle.partial").iterdir())
    existed = job.out.exists()
    path, rows = export_bundle(job)
    return Exported(job, path, rows, left_behind, existed)


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Job:
    """A job whose bundle is there already, for tests that change it."""
    shutil.copytree(exported.path, tmp_path / "bundle")
    return replace(exported.job, out=tmp_path / "bundle")
