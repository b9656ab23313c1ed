"""The command, from files to files."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cloud_server.cli import main
from cloud_server.training.evaluation.pictures import Kept, judged_gain
from cloud_server.training.labels import Labels, read, sample_prompts, write
from cloud_server.training.starter.captions import read_scene
from cloud_server.training.starter.reading import Found, Reading
from tests.made_up import METRICS, make_world
from tests.tiny import make_pipeline, make_router

JUDGE = Path(__file__).parents[4] / "models" / "judge"
TABLE = Path(__file__).parents[5] / "shared" / "data" / "quality" / "tifa160.csv"
DIGESTS = {"edge": "e" * 64, "cloud": "c" * 64}


def run(*arguments):
    return CliRunner().invoke(main, ["evaluate-router", *map(str, arguments)])


def said(text):
    """Return a message as one line, without the frame that click may put around it."""
    return " ".join(text.replace("\n", " ").split())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "edge")


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Ratings of three models on 60 prompts; the cloud's are better where a cat is asked for."""
    file = tmp_path_factory.mktemp("scores") / "scores.csv"
    rng = np.random.default_rng(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(("prompt", "model", "metric", "score"))
        for i in range(60):
            prompt = f"a {'cat' if i % 2 else 'dog'} on grass number {i}"
            for model, quality in (("small", 0.4), ("large", 0.4 + 0.3 * (i % 2)), ("third", 0.5)):
                rows.writerow((prompt, model, "liked", round(quality + rng.uniform(0, 0.1), 4)))
    return file


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Labels of forty captions of the starter world, two seeds, and a picture for each.

    Who scored them is not known in labels.parquet, and was a CLIP in by-clip.parquet.
    """
    folder = tmp_path_factory.mktemp("labels")
    made = make_world(prompts=40, seeds=2).labels
    prompts = tuple(prompt.text for prompt in sample_prompts(40, 0))
    models = {side: {"name": side, "digest": digest} for side, digest in DIGESTS.items()}
    scorer = {"clip": "a clip", "digest": "b" * 64}
    for name, origin in (("labels", {}), ("by-clip", {"scorer": scorer})):
        write(
            Labels(made.q, prompts, (0, 1), METRICS, "d", origin={"models": models} | origin),
            folder / f"{name}.parquet",
        )
    kept = Kept(folder / "pictures", (DIGESTS["edge"], DIGESTS["cloud"]), prompts)
    for model in (0, 1):
        for row in range(40):
            for seed in (0, 1):
                file = kept.file(model, row, seed)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (128, 128), (row, 90 * model, 100)).save(file)
    return folder


def test_a_table_of_ratings_is_cross_validated(scores, encoder, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    result = run(
        "--scores", scores, "--edge-model", "small", "--cloud-model", "large",
        "--text-encoder", encoder, "--predictor", "linear", "--repeats", 2, "--threads", 1,
        "--work", tmp_path / "work", "-o", page, "--json", numbers,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert report["plan"]["description"].startswith("5-fold cross-validation over prompts, 2")
    assert report["plan"]["judged"] == 60
    keys = [row["key"] for row in report["methods"]]
    assert keys == ["ours", "random", "length", "nouns", "knn", "ridge", "routellm", "hybrid",
                    "zooter"]  # fmt: skip
    ours = report["methods"][0]["numbers"]["apgr"]
    assert ours["low"] > 0.6, "cat or dog is in the embedding"
    assert report["predictors"] == "10 linear"
    assert result.stdout.splitlines() == report["verdict"]["sentences"]
    assert report["cascade"] is None, "what people rated, no CLIP measures"
    assert f"--scores {scores}" in report["command"]
    assert "small on the device, large in the cloud" in page.read_text(encoding="utf-8")


def test_labels_are_held_out_judged_otherwise_and_shown(labels, encoder, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    result = run(
        "--labels", labels / "by-clip.parquet", "--text-encoder", encoder, "--held-out", 20,
        "--seeds", 2, "--predictor", "gated", "--steps", 2, "--threads", 1,
        "--pictures", labels / "pictures", "--judge", JUDGE, "--work", tmp_path / "work",
        "-o", page, "--json", numbers,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert (report["plan"]["judged"], report["plan"]["runs"]) == (20, 2)
    assert [row["key"] for row in report["ablations"]] == [
        "gated", "no_metrics", "no_selection", "no_dual_gate",
    ]  # fmt: skip
    assert report["methods"][-1]["name"] == f"single-metric router ({METRICS[0]})"
    assert report["nouns"]["counted"] == "objects"
    assert report["judge"]["name"] == "Objects right"
    rows = [report["methods"][0], *report["cascade"]["rows"]]
    for row in rows:
        assert row["numbers"]["judge_50"]["mean"] == 0, "plain pictures hold nothing"
    assert [row["key"] for row in rows[1:]] == ["before", "after", "quality", "oracle"]
    assert report["cascade"]["pictures"] == 2 * 20
    assert result.stdout.splitlines()[2].startswith("After a look at the edge's picture, half of")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2 * len(report["regrets"])
    assert "edge@eeeeeeeeeeee on the device" in text


def test_a_judge_of_pictures_judges_the_prompts_whose_pictures_are_kept(labels, encoder, tmp_path):
    known, numbers = read(labels / "by-clip.parquet"), tmp_path / "numbers.json"
    prompts = tuple(prompt.text for prompt in sample_prompts(80, 1))
    made = make_world(prompts=80, seeds=2).labels
    write(replace(known, q=made.q, prompts=prompts), tmp_path / "more.parquet")
    result = run(
        "--labels", labels / "by-clip.parquet", "--labels", tmp_path / "more.parquet",
        "--text-encoder", encoder, "--held-out", 40, "--seeds", 1, "--predictor", "linear",
        "--threads", 1, "--no-ablations", "--pictures", labels / "pictures", "--judge", JUDGE,
        "--work", tmp_path / "work", "--json", numbers,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(numbers.read_text(encoding="utf-8"))["plan"]
    assert plan["judged"] == 40
    assert int(re.search(r"(\d+) to learn", plan["description"])[1]) > 60


def test_more_labels_with_fewer_seeds_are_learnt_from_and_not_judged(labels, encoder, tmp_path):
    known, numbers = read(labels / "labels.parquet"), tmp_path / "numbers.json"
    prompts = tuple(prompt.text for prompt in sample_prompts(80, 1))
    made = make_world(prompts=80, seeds=1).labels
    write(replace(known, q=made.q, prompts=prompts, seeds=(0,)), tmp_path / "more.parquet")
    files = ("--labels", labels / "labels.parquet", "--labels", tmp_path / "more.parquet")
    usual = ("--text-encoder", encoder, "--predictor", "linear", "--threads", 1, "--no-ablations")
    result = run(*files, *usual, "--held-out", 20, "--work", tmp_path, "--json", numbers)
    assert result.exit_code == 0, result.output
    plan = json.loads(numbers.read_text(encoding="utf-8"))["plan"]
    both = {*known.prompts, *prompts}
    assert (plan["judged"], plan["prompts"], plan["seeds"]) == (20, len(both), 2)
    assert int(re.search(r"(\d+) to learn", plan["description"])[1]) > 40

    write(replace(known, q=made.q, prompts=prompts, seeds=(7,)), tmp_path / "more.parquet")
    result = run(*files, *usual)
    assert result.exit_code == 1
    assert "no two prompts of these labels have every seed" in said(result.stderr)


def test_a_router_that_is_there_is_not_trained(labels, encoder, tmp_path):
    router, numbers = make_router(tmp_path / "router"), tmp_path / "numbers.json"
    others = tmp_path / "others.parquet"
    write(replace(read(labels / "labels.parquet"), digest="by others"), others)
    result = run(
        "--labels", labels / "by-clip.parquet", "--text-encoder", encoder, "--router", router,
        "--held-out", 20, "--seeds", 1, "--predictor", "linear", "--threads", 1,
        "--judge-scores", others, "--work", tmp_path / "work",
        "--json", numbers,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert report["given_router"]
    assert (report["predictors"], report["ablations"], report["cascade"]) == ("", [], None)
    assert report["methods"][0]["numbers"]["judge_50"] is not None
    assert "learnt from these very prompts is not known" in result.stdout
    assert {one["route"] for one in report["regrets"]} == {"edge", "cloud"}, "half are sent"


def test_a_router_is_judged_on_prompts_that_its_training_held_out(labels, encoder, tmp_path):
    file, router = labels / "labels.parquet", tmp_path / "router"
    trained = CliRunner().invoke(
        main,
        ["train-router", "--labels", str(file), "--text-encoder", str(encoder), "--predictor",
         "linear", "--seed", "3", "-o", str(router)],
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    numbers = tmp_path / "numbers.json"
    usual = ("--text-encoder", encoder, "--router", router, "--threads", 1, "--work", tmp_path)
    result = run("--labels", file, *usual, "--json", numbers)
    assert result.exit_code == 0, result.output
    plan = json.loads(numbers.read_text(encoding="utf-8"))["plan"]
    assert (plan["judged"], plan["description"]) == (8, "8 held-out prompts, 32 to learn from")
    assert "not known" not in result.stdout
    result = run("--labels", file, *usual, "--folds", 3)
    assert result.exit_code == 2
    assert "judged on the 8 prompts that its training held out; leave" in said(result.stderr)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"digest": "d"}, "was scored as the labels were; another judge is another --clip"),
        (
            {"origin": {"models": {"edge": {"name": "p"}, "cloud": {"name": "q"}}}, "digest": "e"},
            "is of other models (p and q) than the labels (edge@eeeeeeeeeeee and cloud@ccc",
        ),
    ],
)
def test_another_judge_must_be_another_of_the_same_models(labels, encoder, tmp_path, changed, told):
    file = labels / "labels.parquet"
    write(replace(read(file), **changed), tmp_path / "others.parquet")
    result = run(
        "--labels", file, "--text-encoder", encoder, "--judge-scores", tmp_path / "others.parquet",
        "--work", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 1
    assert told in said(result.stderr)


def test_pictures_are_found_whatever_the_order_of_the_labels(labels):
    prompts = read(labels / "labels.parquet").prompts
    digests = (DIGESTS["edge"], DIGESTS["cloud"])
    usual = Kept(labels / "pictures", digests, prompts)
    turned = Kept(labels / "pictures", digests, ("a prompt before all others", *prompts[::-1]))
    for row, seed in ((0, 0), (39, 1)):
        assert turned.pair(40 - row, seed) == usual.pair(row, seed) != (None, None)
    assert turned.pair(0, 0) == (None, None)
    assert usual.pair(0, 2) == (None, None)


def test_the_judge_tells_what_the_cloud_gains_over_each_picture_of_the_edge(labels):
    """Of every prompt whose pictures are dark and then bright, it finds all in the bright ones."""
    prompts = read(labels / "labels.parquet").prompts
    kept = Kept(labels / "judged", (DIGESTS["edge"], DIGESTS["cloud"]), prompts)
    for bright, key in ((0, (0, 3, 0)), (255, (0, 3, 1)), (255, (1, 3, 0)), (255, (1, 3, 1))):
        kept.file(*key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 128), (bright, 0, 0)).save(kept.file(*key))
    scene = read_scene(prompts[3])
    everything = tuple(
        Found(group.noun, group.colour, (0, 0, 1, 1))
        for group in scene.groups
        for _ in range(group.count)
    )

    class Bright:
        def read(self, pictures):
            return [Reading(everything if p[0, 0, 0] else (), "") for p in pictures]

    gain = judged_gain(Bright(), kept, np.array([3]), (0, 1))
    assert gain.shape == (40, 2)
    assert gain[3].tolist() == [1, 0]
    assert np.isnan(np.delete(gain, 3, 0)).all()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give either --labels FILE or --scores FILE"),
        (["--held-out", 9, "--folds", 3], 2, "--held-out and --folds are both given"),
        (["--judge", JUDGE], 2, "--judge reads pictures"),
        (["--judge", JUDGE, "--judge-scores", "SCORES"], 2, "--judge and --judge-scores are both"),
        (["--scores", "SCORES"], 2, "--scores needs --edge-model and --cloud-model"),
        (["-o", "missing/page.html"], 2, "the folder missing does not exist"),
        (["--labels", "SCORES"], 1, "cannot read the labels"),
        (["--labels", "LABELS", "--held-out", 39], 2, "of 40 prompts 39 cannot be held out"),
        (["--labels", "LABELS", "--folds", 50], 2, "50 folds need at least as many"),
        (["--labels", "LABELS", "--router", "FOLDER"], 1, "there is no router in"),
        (["--labels", "LABELS", "--pictures", "FOLDER", "--judge", JUDGE], 1, "cannot be read"),
        (
            ["--scores", "SCORES", "--edge-model", "small", "--cloud-model", "large",
             "--pictures", "FOLDER"],
            1,
            "do not say which models drew",
        ),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence(arguments, code, message, labels, scores, encoder, tmp_path):
    files = {"LABELS": labels / "labels.parquet", "SCORES": scores, "FOLDER": tmp_path}
    words = [files.get(str(word), word) for word in arguments]
    result = run(*words, "--text-encoder", encoder, "--work", tmp_path / "work", "--threads", 1)
    assert result.exit_code == code, result.output
    assert message in said(result.stderr)
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not TABLE.is_file(), reason="the tables of ratings are not here")
def test_human_ratings_of_real_models(encoder, tmp_path):
    numbers = tmp_path / "numbers.json"
    result = run(
        "--scores", TABLE, "--edge-model", "SD_1_1", "--cloud-model", "SD_2_1",
        "--metric", "human_alignment_tifa", "--text-encoder", encoder, "--predictor", "linear",
        "--work", tmp_path / "work", "--threads", 1, "--json", numbers,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(numbers.read_text(encoding="utf-8"))
    assert report["plan"]["judged"] == 160
    naive = report["oracles"][0]["numbers"]["apgr"]["mean"]
    assert naive > max(row["numbers"]["apgr"]["mean"] for row in report["methods"])
