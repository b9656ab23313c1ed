"""Labelling as a whole: what is drawn, what is kept, what a kill leaves, who does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cloud_server.errors import DataError, ServerError
from cloud_server.training.labels import KeptPainter, PipelinePainter, label, write
from cloud_server.training.labels.store import Store
from cloud_server.training.labels.work import Work, in_processes
from cloud_server.training.quality import Alignment, Clip, Metric, QualityScorer
from tests.tiny import make_clip, make_pipeline
from tests.wire import until

PROMPTS = ["a cat", "two dogs", "a red house"]
SEEDS = [0, 1]


class ColourScorer:
    """Scores how red and how green a picture is."""

    metrics = (Metric("Red", "a", "b", 0.5), Metric("Green", "a", "b", 0.5))
    digest = "colours"

    @property
    def origin(self):
        return {"clip": "none"}

    def score(self, pictures, prompts):
        return np.stack([np.asarray(p, np.float64)[..., :2].mean((0, 1)) / 255 for p in pictures])


class PlainPainter:
    """Paints one colour: red by the prompt's length, green by model; stops after `patience`."""

    def __init__(self, digest, patience=1000):
        self.settings = {"steps": 1}
        self.name, self.digest, self.patience, self.drawn = digest, digest, patience, []

    def draw(self, prompts, seeds):
        if self.patience < len(prompts):
            raise KeyboardInterrupt
        self.patience -= len(prompts)
        self.drawn += zip(prompts, seeds, strict=True)
        green = 51 if self.digest == "edge" else 204
        return [Image.new("RGB", (4, 4), (10 * len(p), green, 0)) for p in prompts]


class Suicide(PlainPainter):
    """Dies as a process does that the system kills for its memory, at one of the prompts."""

    def draw(self, prompts, seeds):
        if PROMPTS[2] in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(prompts, seeds)


def run(out, edge=None, cloud=None, prompts=PROMPTS, seeds=SEEDS, **how):
    edge, cloud = edge or PlainPainter("edge"), cloud or PlainPainter("cloud")
    return label(edge, cloud, ColourScorer(), prompts, seeds, out, **{"batch": 2, **how})


def store_of(folder, model):
    """Return the file of labels of a model."""
    (store,) = [s for s in folder.iterdir() if f'"model": "{model}"' in s.read_text()]
    return store


def test_qualities_come_by_model_prompt_seed_and_metric(tmp_path):
    labels = run(tmp_path)
    assert labels.q.shape == (2, 3, 2, 2)
    assert labels.metrics == ("Red", "Green")
    np.testing.assert_allclose(labels.q[0, ..., 1], 0.2, atol=1e-6)
    np.testing.assert_allclose(labels.q[1, ..., 1], 0.8, atol=1e-6)
    for p, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(labels.q[:, p, :, 0], 10 * len(prompt) / 255, atol=1e-6)
    assert labels.weights.tolist() == [0.5, 0.5]
    assert labels.origin["models"]["cloud"] == {
        "name": "cloud",
        "digest": "cloud",
        "settings": {"steps": 1},
    }
    assert labels.origin["versions"]["torch"].startswith("2.")


def test_both_models_start_from_the_same_noise_and_no_two_pictures_share_it(tmp_path):
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud")
    run(tmp_path, edge, cloud)
    assert edge.drawn == cloud.drawn
    assert len({seed for _, seed in edge.drawn}) == len(PROMPTS) * len(SEEDS)


@pytest.mark.parametrize("patience", [0, 2, 3, 5, 6])
def test_a_stopped_run_goes_on_with_the_missing_pictures(tmp_path, patience):
    edge, cloud = PlainPainter("edge", patience), PlainPainter("cloud", 0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, edge, cloud)
    again, cloud = PlainPainter("edge"), PlainPainter("cloud")
    labels = run(tmp_path, again, cloud)
    assert not set(again.drawn) & set(edge.drawn)
    assert len(again.drawn) + len(edge.drawn) == len(cloud.drawn) == 6
    np.testing.assert_array_equal(labels.q, run(tmp_path / "whole").q)


def test_a_finished_store_draws_nothing(tmp_path):
    first = run(tmp_path)
    idle = PlainPainter("edge", 0), PlainPainter("cloud", 0)
    np.testing.assert_array_equal(run(tmp_path, *idle).q, first.q)


def test_more_seeds_cost_only_themselves(tmp_path):
    first = run(tmp_path, seeds=[0])
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud")
    labels = run(tmp_path, edge, cloud, seeds=[0, 1])
    assert len(edge.drawn) == len(cloud.drawn) == 3
    assert labels.digest != first.digest
    np.testing.assert_array_equal(labels.q[:, :, :1], first.q)


def test_the_edge_may_draw_more(tmp_path):
    first = run(tmp_path, seeds=[0])
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud", 0)
    labels = run(tmp_path, edge, cloud, seeds=[0], edge_seeds=[0, 1, 2])
    assert len(edge.drawn) == len(PROMPTS) * 2
    assert labels.seeds == (0, 1, 2)
    assert labels.digest != first.digest
    assert labels.drawn.sum(2).tolist() == [[3] * 3, [1] * 3]
    np.testing.assert_array_equal(labels.q[:, :, :1], first.q)
    np.testing.assert_allclose(labels.mean[..., 1], [[0.2] * 3, [0.8] * 3], atol=1e-6)


@pytest.mark.parametrize("cut", [1, 9, 36])
def test_a_line_that_was_half_written_is_drawn_again(tmp_path, cut):
    first = run(tmp_path)
    store = store_of(tmp_path, "cloud")
    store.write_bytes(store.read_bytes()[:-cut])
    edge, cloud = PlainPainter("edge"), PlainPainter("cloud")
    np.testing.assert_array_equal(run(tmp_path, edge, cloud).q, first.q)
    assert (len(edge.drawn), len(cloud.drawn)) == (0, 1)
    lines = store.read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in lines]) == 1 + 4


def test_a_store_cut_within_its_first_line_starts_again(tmp_path):
    first = run(tmp_path)
    store = store_of(tmp_path, "cloud")
    store.write_bytes(store.read_bytes()[:20])
    np.testing.assert_array_equal(run(tmp_path).q, first.q)


def test_a_store_that_somebody_edited_is_refused(tmp_path):
    run(tmp_path)
    store = store_of(tmp_path, "cloud")
    store.write_text(store.read_text().replace('"q"', '"qualities"'))
    with pytest.raises(DataError, match="damaged at line 2"):
        run(tmp_path)


def test_two_runs_do_not_share_a_store(tmp_path):
    with Store(tmp_path, {"a": 1}), pytest.raises(ServerError, match="another run is writing"):
        Store(tmp_path, {"a": 1}).__enter__()
    with Store(tmp_path, {"a": 1}) as store:
        store.add([(0, 0)], [[0.5]])


def test_other_models_or_prompts_get_a_store_of_their_own(tmp_path):
    digests = {
        run(tmp_path).digest,
        run(tmp_path, edge=PlainPainter("better edge")).digest,
        run(tmp_path, prompts=PROMPTS[:2]).digest,
    }
    assert len(digests) == 3
    assert len(list(tmp_path.iterdir())) == 5


def test_a_new_edge_model_leaves_the_labels_of_the_cloud_as_they_are(tmp_path):
    first = run(tmp_path)
    cloud = PlainPainter("cloud", 0)
    labels = run(tmp_path, edge=PlainPainter("better edge"), cloud=cloud)
    np.testing.assert_array_equal(labels.q[1], first.q[1])
    assert labels.q[0, ..., 1].max() > first.q[0, ..., 1].max()


def test_a_prompt_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="stands twice"):
        run(tmp_path, prompts=["a cat", "a cat"])


def test_a_worker_that_dies_is_one_sentence_and_nothing_is_lost(tmp_path):
    how = {"batch": 1, "spread": in_processes(1)}
    with pytest.raises(ServerError, match="a worker process died"):
        run(tmp_path, Suicide("edge"), seeds=[0], **how)
    again = PlainPainter("edge")
    labels = run(tmp_path, again, seeds=[0], batch=1)
    assert again.drawn == [(PROMPTS[2], 2)]
    np.testing.assert_array_equal(labels.q, run(tmp_path / "whole", seeds=[0]).q)


def test_what_a_worker_raises_reaches_the_caller(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, PlainPainter("edge", patience=0), spread=in_processes(2))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_clip(folder / "clip")
    make_pipeline(folder / "edge", seed=1)
    make_pipeline(folder / "cloud", seed=2, unet_channels=(32, 96))
    return folder


def real(models, out, pictures=None, **how):
    """Label with real tiny models and return the file of labels."""
    painters = [PipelinePainter(models / side) for side in ("edge", "cloud")]
    if pictures:
        painters = [KeptPainter(painter, pictures) for painter in painters]
    scorer = QualityScorer(Clip(models / "clip"), alignment=Alignment(0.5, tuple(PROMPTS)))
    labels = label(*painters, scorer, PROMPTS, SEEDS, out, batch=2, **how)
    write(labels, out / "labels.parquet")
    return out / "labels.parquet"


@pytest.mark.slow
def test_workers_write_the_same_file_as_one(models, tmp_path):
    alone = real(models, tmp_path / "one")
    spread = real(models, tmp_path / "two", tmp_path / "pictures", spread=in_processes(2))
    assert spread.read_bytes() == alone.read_bytes()
    kept = real(models, tmp_path / "kept", tmp_path / "pictures")
    assert kept.read_bytes() == alone.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # Ray's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_writes_the_same_file(models, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine never lets them begin
    from cloud_server.training.labels.on_ray import on_ray

    alone = real(models, tmp_path / "one")
    try:
        spread = real(models, tmp_path / "ray", spread=on_ray(2))
    finally:
        ray.shutdown()
    assert spread.read_bytes() == alone.read_bytes()


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch):
    from cloud_server.training.labels.on_ray import on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ServerError, match=r"pip install .*'\.\[cloud,ray\]'"):
        on_ray(2)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_drawing_twice(models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a cat and {n} dogs\n" for n in range(60)), encoding="utf-8")
    out = tmp_path / "labels.parquet"
    command = [
        sys.executable, "-m", "cloud_server", "label", "--prompts", prompts, "-o", out,
        "--edge", models / "edge", "--cloud", models / "cloud", "--clip", models / "clip",
        "--seeds", "1", "--batch", "4", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    work = tmp_path / "labels.parquet.work"
    until(lambda: bool(lines_in(work)))
    process.kill()
    process.wait()
    assert not out.exists()
    kept = lines_in(work)
    assert 0 < len(kept) < 30
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{out}\n"
    everything = lines_in(work)
    assert set(kept) <= set(everything)
    assert len(everything) == 30
    whole = tmp_path / "whole.parquet"
    subprocess.run([*command[:7], whole, *command[8:]], check=True, capture_output=True)
    assert whole.read_bytes() == out.read_bytes()


def lines_in(work):
    """Return the whole lines of batches in the stores of a work folder."""
    lines = []
    for store in sorted(work.glob("*.jsonl")):
        text = store.read_text(encoding="utf-8")
        lines += text[: text.rfind("\n") + 1].splitlines()[1:]
    return lines


def test_a_work_is_light_until_it_is_done(models):
    import pickle

    work = Work(
        KeptPainter(PipelinePainter(models / "edge"), Path("pictures")),
        QualityScorer(Clip(models / "clip"), alignment=Alignment(0.5, tuple(PROMPTS))),
        tuple(PROMPTS),
    )
    before = len(pickle.dumps(work))
    assert before < 10_000


class Waiting(PlainPainter):
    """Leaves its process's number in the folder it is named by, and then waits."""

    def draw(self, prompts, seeds):
        (Path(self.name) / str(os.getpid())).touch()
        while True:
            signal.pause()


def lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to look into")
def test_workers_end_with_the_run_that_was_killed(tmp_path):
    program = (
        "from pathlib import Path\n"
        "from tests.cloud_server.training.labels.test_label import ColourScorer, Waiting\n"
        "from cloud_server.training.labels.work import Work, in_processes\n"
        "if __name__ == '__main__':\n"
        f"    work = Work(Waiting({str(tmp_path)!r}), ColourScorer(), ('a cat',))\n"
        "    list(in_processes(2)(work, [((0, 0),), ((0, 1),)]))\n"
    )
    (tmp_path / "main.py").write_text(program)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    with subprocess.Popen([sys.executable, tmp_path / "main.py"], env=env) as process:
        until(lambda: len([f for f in tmp_path.iterdir() if f.name.isdigit()]) == 2)
        process.kill()
    workers = [f.name for f in tmp_path.iterdir() if f.name.isdigit()]
    until(lambda: not any(map(lives, workers)))


def test_a_full_disk_is_one_sentence_and_what_was_labelled_stays(tmp_path, monkeypatch):
    run(tmp_path, PlainPainter("edge"), prompts=PROMPTS[:1])
    store = store_of(tmp_path, "edge")
    kept = store.read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")

    with Store(tmp_path, json.loads(kept.splitlines()[0])) as opened:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ServerError, match=r"cannot be written \(No space left on device\)"):
            opened.add([(9, 9)], [[0.5, 0.5]])
    assert store.read_bytes().startswith(kept)
