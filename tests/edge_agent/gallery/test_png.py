"""Pictures carry their record and are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_agent.errors import OutputError
from edge_agent.gallery.png import check_folder, read_record, write_png

RECORD = {"prompt": "a fox 🦊 in the snow", "seed": 7}


def picture() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB")


def locked_folder(tmp_path: Path) -> Path:
    """Return a folder that nobody here can write to; root can write to all but the kernel's."""
    if os.geteuid() == 0:
        if not Path("/sys/kernel").is_dir():
            pytest.skip("root can write everywhere on this system")
        return Path("/sys/kernel")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    return folder


def test_a_picture_gives_its_record_back(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(), RECORD)
    assert read_record(tmp_path / "a.png") == RECORD
    assert Image.open(tmp_path / "a.png").tobytes() == picture().tobytes()


def test_a_picture_is_written_and_read_by_a_name_too(tmp_path: Path) -> None:
    write_png(str(tmp_path / "a.png"), picture(), RECORD)
    assert read_record(str(tmp_path / "a.png")) == RECORD


def test_equal_input_gives_equal_bytes_and_nothing_else_in_the_folder(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, picture(), RECORD)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = locked_folder(tmp_path)
    with pytest.raises(OutputError, match=f"{folder} is not writable.*another -o"):
        write_png(folder / "a.png", picture(), RECORD)


def test_a_missing_folder_is_named_before_drawing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"gone does not exist; create it"):
        check_folder(tmp_path / "gone" / "a.png")


def test_a_full_disk_leaves_the_old_picture_and_no_half_one(tmp_path: Path) -> None:
    # A limit on file size is the full disk that needs no mount: the same write fails midway.
    program = """
import resource, sys
from pathlib import Path
from PIL import Image
from edge_agent.errors import OutputError
from edge_agent.gallery.png import write_png
Image.preinit()
image = Image.effect_noise((128, 128), 50)
file = Path(sys.argv[1])
file.write_text("old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_png(file, image, {})
except OutputError as err:
    sys.exit(str(err))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert "there is no room for" in done.stderr, done.stderr
    assert (tmp_path / "a.png").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"text", "is not a picture"), (None, "carries no record")]
)
def test_a_file_without_a_record_says_so(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "a.png"
    picture().save(file) if content is None else file.write_bytes(content)
    with pytest.raises(OutputError, match=message):
        read_record(file)
