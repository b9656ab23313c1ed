"""Labels with a history and without, on real sessions and files; the command around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_agent.bundle import open_bundle
from edge_agent.cli import run
from edge_agent.errors import BundleError, PictureError
from edge_agent.gallery.png import read_record
from edge_agent.recognition.history import History
from edge_agent.recognition.recognizer import Recognition, Recognizer
from tests.edge_agent.conftest import edit_manifest
from tests.edge_agent.recognition.conftest import CLASSES, DIGEST

Write = Callable[..., Path]


def opened(bundle: Path, folder: Path, **settings: int) -> Recognizer:
    return Recognizer(open_bundle(bundle), folder / "histories", threads=1, **settings)


def best(found: Recognition) -> str:
    return found.labels[0].name


def kept(folder: Path, client: str) -> int:
    return len(History(folder / "histories", client, DIGEST, 3).read().features)


def test_the_first_picture_is_named_by_the_backbone_alone(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    found = opened(recognizing_bundle, tmp_path).recognize(picture("a.png", 250, 20, 20), "anna")
    assert best(found) == "red"
    assert (found.adapted, found.history, found.note) == (False, 0, None)
    assert [label.name for label in found.labels][-1] in CLASSES
    assert sum(label.probability for label in found.labels) == pytest.approx(1)


def test_a_history_changes_what_a_dim_picture_is_taken_for(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    recognizer = opened(recognizing_bundle, tmp_path)
    dim = picture("dim.png", 20, 20, 25)
    assert best(recognizer.recognize(dim, "nobody")) == "dark"
    seen = [recognizer.recognize(picture("r.png", 250, 9, 9), "anna") for _ in range(4)]
    assert [one.history for one in seen] == [0, 1, 2, 3]
    assert [one.adapted for one in seen] == [False, False, False, True]  # as the bundle says
    found = recognizer.recognize(dim, "anna")
    assert (best(found), found.adapted, found.history) == ("red", True, 4)
    assert best(recognizer.recognize(dim, "bert")) == "dark"


def test_a_module_that_is_never_to_be_asked_is_not(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    edit_manifest(recognizing_bundle, lambda it: it["recognizer"].update(least_history=None))
    recognizer = opened(recognizing_bundle, tmp_path)
    seen = [recognizer.recognize(picture("r.png", 250, 9, 9), "anna") for _ in range(5)]
    assert not any(one.adapted for one in seen)


def test_a_bundle_that_does_not_say_when_to_ask_it_is_refused(recognizing_bundle: Path) -> None:
    edit_manifest(recognizing_bundle, lambda it: it["recognizer"].pop("least_history"))
    with pytest.raises(BundleError, match=r"no usable 'recognizer\.least_history'"):
        open_bundle(recognizing_bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("history", 100), ("history", -1), ("digest", "x" * 64), ("digest", "ab"), ("side", 0),
        ("crop", 0.0), ("width", 0), ("least_history", -1),
    ],
)  # fmt: skip
def test_a_bundle_with_senseless_values_is_refused(
    recognizing_bundle: Path, key: str, value: object
) -> None:
    edit_manifest(recognizing_bundle, lambda it: it["recognizer"].update({key: value}))
    with pytest.raises(BundleError, match=rf"no usable 'recognizer\.{key}'"):
        open_bundle(recognizing_bundle)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", ["red", "green"], "answers with 4 numbers for 2 classes"),
        ("width", 5, "features have 3 numbers and not 5"),
    ],
)
def test_networks_of_another_size_than_the_bundle_says_are_refused(
    recognizing_bundle: Path, picture: Write, tmp_path: Path, key: str, value: object, words: str
) -> None:
    edit_manifest(recognizing_bundle, lambda it: it["recognizer"].update({key: value}))
    with pytest.raises(BundleError, match=words):
        opened(recognizing_bundle, tmp_path).recognize(picture("a.png", 250, 20, 20), "anna")


def test_a_history_goes_on_in_the_next_process(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    for _ in range(4):
        opened(recognizing_bundle, tmp_path).recognize(picture("r.png", 250, 9, 9), "anna")
    found = opened(recognizing_bundle, tmp_path).recognize(picture("d.png", 20, 20, 25), "anna")
    assert best(found) == "red"


@pytest.mark.parametrize(("length", "looked_at"), [(0, 0), (2, 2), (None, 15), (60, 20)])
def test_as_many_are_looked_at_as_asked_for_and_as_many_are_kept_as_ever(
    recognizing_bundle: Path, picture: Write, tmp_path: Path, length: int | None, looked_at: int
) -> None:
    recognizer = opened(recognizing_bundle, tmp_path, history=length)
    files = [picture("r.png", 250, 9, 9)] * 21
    assert [recognizer.recognize(file, "anna") for file in files][-1].history == looked_at
    assert kept(tmp_path, "anna") == 21


def test_a_length_that_is_never_kept_is_refused(recognizing_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a history of 61 is not from 0 to 60"):
        opened(recognizing_bundle, tmp_path, history=61)


def test_pictures_of_a_folder_are_each_others_context(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    files = [picture(f"f/{i:02}.png", 250, 9, 9) for i in range(18)]
    files.insert(3, picture("f/dim.png", 20, 20, 25))
    found = list(opened(recognizing_bundle, tmp_path).recognize_all(files, "anna"))
    assert all(isinstance(one, Recognition) for one in found)
    assert [one.history for one in found] == [15] * 16 + [17] * 3  # 15 before and 2 beside
    assert {best(one) for one in found} == {"red"}
    assert kept(tmp_path, "anna") == 19
    alone = list(opened(recognizing_bundle, tmp_path, history=0).recognize_all(files, "eve"))
    assert {(one.history, one.adapted) for one in alone} == {(0, False)}


def test_an_unreadable_picture_is_an_error_and_the_others_go_on(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    files = [picture(f"f/{i}.png", 250, 9, 9) for i in range(3)]
    files[1].write_text("hello")
    found = list(opened(recognizing_bundle, tmp_path).recognize_all(files, "anna"))
    assert [type(one) for one in found] == [PictureError, Recognition, Recognition]
    assert kept(tmp_path, "anna") == 2


def test_a_bundle_without_a_recogniser_says_how_to_add_one(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="has no recogniser; run `python -m export --recognizer"):
        opened(tiny_bundle, tmp_path)


@pytest.fixture
def command(
    recognizing_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        env = os.environ | {
            "EDGE_AGENT_BUNDLE": str(recognizing_bundle),
            "EDGE_AGENT_HISTORIES": str(tmp_path / "histories"),
        }
        code = run(["recognize", *map(str, arguments)], env)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_prints_labels_in_lines_or_json(command, picture: Write) -> None:
    file = picture("a.png", 250, 20, 20)
    code, out, err = command(file, "--client", "anna", "--top", "2")
    assert (code, err) == (0, "")
    name, labels = out.strip().split(": ")
    assert name == str(file)
    assert labels.startswith(("red 7", "red 8"))
    assert len(labels.split(", ")) == 2
    code, out, _ = command(file, "--client", "anna", "--json")
    record = json.loads(out)
    assert (record["file"], record["client"], record["history"]) == (str(file), "anna", 1)
    assert record["labels"][0]["name"] == "red"


def test_the_command_takes_a_folder_and_goes_on_past_bad_files(
    command, picture: Write, tmp_path: Path
) -> None:
    good = [picture(f"f/{i}.png", 250, 20, 20) for i in range(3)]
    (tmp_path / "f/1.png").write_text("hello")
    code, out, err = command(tmp_path / "f", good[0], tmp_path / "none.png")
    assert code == 1
    assert len(out.splitlines()) == 3
    assert "1.png is not a picture" in err
    assert "none.png cannot be read" in err
    assert kept(tmp_path, "owner") == 3


def test_forgetting_by_command(command, picture: Write, tmp_path: Path) -> None:
    file = picture("a.png", 250, 20, 20)
    command(file, "--client", "anna")
    code, out, err = command("--forget", "anna")
    assert (code, out) == (0, "")
    assert "the history of client 'anna' is deleted" in err
    assert kept(tmp_path, "anna") == 0
    code, _, err = command("--forget", "anna")
    assert (code, "there was no history of client 'anna'" in err) == (0, True)


def test_another_backbone_is_told_of_once(command, picture: Write, tmp_path: Path) -> None:
    history = History(tmp_path / "histories", "owner", "cd" * 32, 3)
    history.append(np.ones((1, 3), np.float32))
    code, _, err = command(*[picture(f"{i}.png", 250, 20, 20) for i in range(3)])
    assert code == 0
    assert err.count("was made by another backbone; a fresh one begins") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no picture to recognise; give IMAGE... or a folder"),
        (["a.png", "--top", "0"], "--top"),
        (["a.png", "--history", "61"], "choose a whole number from 0 to 60"),
    ],
)
def test_wrong_usage_is_said(command, arguments: list[str], words: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_recognising_loads_no_torch_and_opens_no_socket(
    recognizing_bundle: Path, picture: Write, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "def guard(event, arguments):\n"
        "    assert not event.startswith('socket.'), event\n"
        "sys.addaudithook(guard)\n"
        "from edge_agent.cli import run\n"
        "code = run(sys.argv[1:], {})\n"
        "print(code, sorted({'torch', 'grpc', 'timm'} & set(sys.modules)))\n"
    )
    file = picture("a.png", 250, 20, 20)
    arguments = ["recognize", str(file), "--bundle", str(recognizing_bundle)]
    arguments += ["--histories", str(tmp_path / "h")]
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1:] == ["0 []"], ran.stderr


def test_a_drawn_picture_is_tagged_alike_every_time_and_nothing_is_kept(
    recognizing_bundle: Path, tmp_path: Path
) -> None:
    histories = tmp_path / "histories"
    recognizer = Recognizer(open_bundle(recognizing_bundle), histories, top=2)
    image = Image.new("RGB", (30, 20), (200, 20, 10))
    first, again = recognizer.tags(image), recognizer.tags(image)
    assert [label.name for label in first] == ["red", "dark"]
    assert first == again
    assert not histories.exists()


def test_generating_with_a_recogniser_writes_tags(
    recognizing_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    env = {"EDGE_AGENT_BUNDLE": str(recognizing_bundle), "EDGE_AGENT_TOP": "2"}
    assert run(["generate", "a cat", "--seed", "3", "-o", str(out), "--json"], env) == 0
    printed = json.loads(capsys.readouterr().out)["tags"]
    assert printed == read_record(out)["tags"]
    assert len(printed) == 2
    assert {tag["name"] for tag in printed} <= {"red", "green", "blue", "dark"}


@pytest.mark.parametrize(
    ("stopping", "told"),
    [
        (KeyboardInterrupt(), "no tags: KeyboardInterrupt"),
        (MemoryError(), "no tags: MemoryError"),
        (ModuleNotFoundError("No module named 'fcntl'"), "no tags: No module named 'fcntl'"),
    ],
)
def test_a_finished_picture_is_kept_though_it_cannot_be_tagged(
    recognizing_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopping: BaseException,
    told: str,
) -> None:
    def stop(self: Recognizer, image: Image.Image) -> None:
        raise stopping

    monkeypatch.setattr(Recognizer, "tags", stop)
    out = tmp_path / "cat.png"
    arguments = ["a cat", "--bundle", str(recognizing_bundle), "-o", str(out), "--offline"]
    assert run(arguments, {}) == 0
    assert told in capsys.readouterr().err
    assert "tags" not in read_record(out)
