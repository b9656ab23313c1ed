"""Histories: bounded, whole after any kill, apart by client, fresh for another backbone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import HistoryError
from edge_agent.recognition.history import History, forget

DIGEST, WIDTH = "ab" * 32, 8


def opened(folder: Path, client: str = "anna", digest: str = DIGEST) -> History:
    return History(folder, client, digest, WIDTH)


def row(value: float) -> np.ndarray:
    return np.full((1, WIDTH), value, np.float32)


def test_the_newest_sixty_are_kept_in_order(tmp_path: Path) -> None:
    history = opened(tmp_path)
    for i in range(100):
        before = history.append(row(i)).features
        assert before[:, 0].tolist() == list(range(max(0, i - 60), i))
    assert opened(tmp_path).read().features[:, 0].tolist() == list(range(40, 100))


def test_several_at_once_are_one_step(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append(np.concatenate([row(i) for i in range(70)]))
    assert history.read().features[:, 0].tolist() == list(range(10, 70))


def test_the_file_never_grows_beyond_its_bound(tmp_path: Path) -> None:
    history, sizes = opened(tmp_path), set()
    for i in range(300):
        history.append(row(i))
        sizes.add(history.file.stat().st_size)
    assert max(sizes) == 52 + 60 * WIDTH * 4 + 4
    assert {file.name for file in tmp_path.iterdir()} == {"lock", "anna.history"}


def test_clients_are_apart_whatever_they_are_called(tmp_path: Path) -> None:
    names = ["anna", "Anna", "../anna", "a/b", "..", "ü" * 300, "ü" * 301, "anna.history", "x\n"]
    for i, name in enumerate(names):
        opened(tmp_path, name).append(row(i))
    for i, name in enumerate(names):
        assert opened(tmp_path, name).read().features[:, 0].tolist() == [i]
    assert all(file.parent == tmp_path for file in tmp_path.rglob("*.history"))
    with pytest.raises(HistoryError, match="the client has no name"):
        opened(tmp_path, "")


def test_forgetting_one_client_leaves_the_others(tmp_path: Path) -> None:
    for name in ("anna", "bert"):
        opened(tmp_path, name).append(row(1))
    assert forget(tmp_path, "anna")
    assert not forget(tmp_path, "anna")
    assert not forget(tmp_path / "nowhere", "anna")
    assert len(opened(tmp_path, "anna").read().features) == 0
    assert len(opened(tmp_path, "bert").read().features) == 1


def test_another_backbone_begins_afresh_and_says_so(tmp_path: Path) -> None:
    opened(tmp_path).append(row(1))
    other = opened(tmp_path, digest="cd" * 32)
    kept = other.append(row(2))
    assert len(kept.features) == 0
    assert kept.note is not None
    assert "was made by another backbone; a fresh one begins" in kept.note
    assert other.read().features[:, 0].tolist() == [2]
    assert other.read().note is None


def test_another_width_begins_afresh(tmp_path: Path) -> None:
    opened(tmp_path).append(row(1))
    kept = History(tmp_path, "anna", DIGEST, WIDTH + 1).read()
    assert kept.features.shape == (0, WIDTH + 1)
    assert "another backbone" in str(kept.note)


def test_a_file_cut_anywhere_or_changed_anywhere_is_never_believed(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append(np.concatenate([row(i) for i in range(5)]))
    whole = history.file.read_bytes()
    for length in range(len(whole)):
        history.file.write_bytes(whole[:length])
        kept = history.read()
        assert len(kept.features) == 0
        assert kept.note is not None
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        history.file.write_bytes(changed)
        assert len(history.read().features) == 0
    history.append(row(9))
    assert history.read().features[:, 0].tolist() == [9]


def test_a_file_of_a_later_version_says_which(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append(row(1))
    content = bytearray(history.file.read_bytes())
    content[8] = 7
    history.file.write_bytes(content)
    note = str(history.append(row(2)).note)
    assert "is of version 7, and this is 1: it is kept as anna.history.other-version" in note
    aside = tmp_path / "anna.history.other-version"
    assert aside.read_bytes() == content, "whoever goes back to that version finds it"
    assert history.read().features[:, 0].tolist() == [2]
    assert forget(tmp_path, "anna")
    assert {file.name for file in tmp_path.iterdir()} == {"lock"}


def test_what_cannot_be_forgotten_is_said_to_be_there(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append(row(1))
    history.file.with_suffix(".partial").mkdir()
    with pytest.raises(HistoryError, match=r"anna\.history could not be deleted"):
        forget(tmp_path, "anna")
    assert history.file.is_file()


def test_a_name_need_not_be_utf_8(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"\xff\xfe"), os.fsdecode(b"\xff" * 300)):
        History(tmp_path, name, DIGEST, WIDTH).append(row(1))
        assert forget(tmp_path, name)


def test_a_history_that_cannot_be_written_is_said_and_stays(tmp_path: Path) -> None:
    history = opened(tmp_path)
    history.append(row(1))
    history.file.with_suffix(".partial").mkdir()
    with pytest.raises(HistoryError, match=r"anna\.history cannot be read or w.* --histories"):
        history.append(row(2))
    assert history.read().features[:, 0].tolist() == [1]


def test_threads_and_processes_on_one_client_lose_nothing(tmp_path: Path) -> None:
    def add(first: int) -> None:
        for i in range(10):
            opened(tmp_path).append(row(first + i))

    threads = [threading.Thread(target=add, args=(100 * n,)) for n in range(3)]
    others = [_writer(tmp_path, 1000 * n, 10) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in others:
        process.communicate()
    wanted = {100 * n + i for n in range(3) for i in range(10)}
    wanted |= {1000 * n + i for n in (1, 2) for i in range(10)}
    values = opened(tmp_path).read().features[:, 0].tolist()
    assert set(values) == wanted
    for n in (0, 100, 200, 1000, 2000):
        mine = [value for value in values if n <= value < n + 100]
        assert mine == sorted(mine)


_PROGRAM = """
import sys, numpy as np
from pathlib import Path
from edge_agent.recognition.history import History
folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
history = History(folder, "anna", "ab" * 32, 8)
for i in range(first, first + count):
    history.append(np.full((1, 8), i, np.float32))
    print(i, flush=True)
"""


def _writer(folder: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_at_any_point_loses_at_most_the_picture_it_was_at(tmp_path: Path) -> None:
    rng, last = random.Random(0), -1
    for _ in range(25):
        process = _writer(tmp_path, last + 1, 10**6)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        kept = opened(tmp_path).read()
        assert kept.note is None
        values = kept.features[:, 0].astype(int).tolist()
        assert values == list(range(values[0], values[-1] + 1))
        assert len(values) <= 60
        told = int(said[-1]) if said else last + 1
        assert values[-1] in (told, told + 1)  # one may have been written and not yet told
        last = values[-1]


@pytest.mark.slow
def test_a_hundred_thousand_pictures_leave_one_small_file(tmp_path: Path) -> None:
    import resource

    history = opened(tmp_path)
    for i in range(1000):
        history.append(row(i))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(1000, 100_000):
        history.append(row(i))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_192  # kilobytes
    assert history.file.stat().st_size == 52 + 60 * WIDTH * 4 + 4
    assert history.read().features[:, 0].tolist() == list(range(99_940, 100_000))
