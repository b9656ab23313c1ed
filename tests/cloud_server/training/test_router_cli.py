"""`cloud-server train-router`: a router from labels or ratings, and a sentence for wrong input."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner

from cloud_server.cli import main
from cloud_server.training.labels import Labels, write
from cloud_server.training.quality import Metric
from tests.tiny import WORDS, make_bert


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture
def scores(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        (f"{' '.join(rng.choice(WORDS, 3))} {i}", model, metric, f"{rng.uniform():.3f}")
        for i in range(40)
        for model in ("small", "large", "other")
        for metric in ("quality", "alignment")
    ]
    prompts = [row[0] for row in rows[::6]]
    rows = [(prompts[i // 6], *row[1:]) for i, row in enumerate(rows)]
    return write_csv(tmp_path / "scores.csv", rows)


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("prompt", "model", "metric", "score"), *rows])
    return file


def read_csv(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))[1:]


@pytest.fixture
def labels(tmp_path):
    rng = np.random.default_rng(0)
    metrics = (Metric("Detail", "much", "little", 0.5), Metric("Layout", "fine", "poor", 0.5))
    q = rng.uniform(0.4, 0.6, (2, 30, 2, 2))
    prompts = tuple(f"{' '.join(rng.choice(WORDS, 3))} {i}" for i in range(30))
    file = tmp_path / "labels.parquet"
    write(Labels(q, prompts, (0, 1), ("Detail", "Layout"), "made-up", metrics), file)
    return file


def call(*arguments):
    return CliRunner().invoke(main, ["train-router", *map(str, arguments)])


def failure(*arguments, code=1):
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


PAIR = ("--edge-model", "small", "--cloud-model", "large")


def test_ratings_become_a_router(scores, encoder, tmp_path):
    calibration = tmp_path / "prompts.txt"
    calibration.write_text("\n".join(f"a {word}" for word in WORDS), encoding="utf-8")
    out = tmp_path / "router"
    result = call(
        "--scores", scores, *PAIR, "--text-encoder", encoder, "--calibration", calibration,
        "--predictor", "linear", "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "on 8 held-out prompts" in result.stderr
    assert "12 calibration prompts" in result.stderr
    facts = json.loads((out / "router.json").read_text())
    assert [metric["name"] for metric in facts["metrics"]] == ["alignment", "quality"]
    assert (facts["edge_model"], facts["cloud_model"]) == ("small", "large")


def test_labels_become_a_router_and_sizes_are_settings(labels, encoder, tmp_path):
    out = tmp_path / "router"
    result = call(
        "--labels", labels, "--text-encoder", encoder, "--predictor", "gated", "--steps", 2,
        "--top-k", 3, "--hidden", 12, "--low-rank", 5, "--single-gate", "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["top_k"], config["hidden"], config["low_rank"]) == (3, 12, 5)
    assert (config["single_gate"], config["all_tokens"]) == (True, False)
    assert (tmp_path / "router.work").is_dir()


def test_only_the_metrics_asked_for_are_learnt(scores, encoder, tmp_path):
    result = call(
        "--scores", scores, *PAIR, "--metric", "quality", "--text-encoder", encoder,
        "--predictor", "linear", "-o", tmp_path / "router",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "router" / "router.json").read_text())
    assert [metric["name"] for metric in facts["metrics"]] == ["quality"]


def test_prompts_without_a_rating_are_counted(scores, encoder, tmp_path):
    rows = read_csv(scores)
    gone = {row[0] for row in rows[:18]}
    kept = [row for row in rows if not (row[0] in gone and row[1] == "large")]
    result = call(
        "--scores", write_csv(scores, kept), *PAIR, "--text-encoder", encoder, "--predictor",
        "linear", "-o", tmp_path / "router",
    )  # fmt: skip
    assert "3 of 40 prompts lack a rating of small or large and are left out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --labels FILE or --scores FILE"),
        (["--scores", "{scores}"], "--scores needs --edge-model and --cloud-model"),
        (["--scores", "{scores}", "--labels", "{labels}"], "give either --labels FILE or"),
        (["--labels", "{labels}", "--metric", "Detail"], "choose from --scores; labels are of one"),
        (["--labels", "{labels}", "--all-tokens"], "the ablations are of the gated predictor"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments, sentence, scores, labels):
    filled = [each.format(scores=scores, labels=labels) for each in arguments]
    assert sentence in failure(*filled, code=2)


def test_unknown_models_and_metrics_are_answered_with_those_there_are(scores, encoder):
    given = ("--scores", scores, "--text-encoder", encoder)
    named = failure(*given, "--edge-model", "tiny", "--cloud-model", "large")
    assert "has no edge model 'tiny'; it has large, other, small" in named
    assert "has no metric 'beauty'; it has alignment, quality" in failure(
        *given, *PAIR, "--metric", "beauty"
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("a cat", m, "quality", "0.5") for m in ("small", "large")], "of 1 prompt only"),
        (
            [(f"cat {i}", m, "quality", "0.5") for m in ("small", "large") for i in range(20)],
            "'quality' is 0.5 for every picture",
        ),
        (
            [(f"cat {i}", m, "mos", str(i)) for m in ("small", "large") for i in range(20)],
            "the score 2 of mos in line 4 of",
        ),
        ([("a cat", "small", "quality", "nan")], "the score 'nan' in line 2 of"),
    ],
)
def test_tables_that_teach_nothing_are_one_sentence(rows, sentence, encoder, tmp_path):
    table = write_csv(tmp_path / "table.csv", rows)
    given = ("--scores", table, *PAIR, "--text-encoder", encoder, "-o", tmp_path / "router")
    assert sentence in failure(*given)
    assert not (tmp_path / "router").exists()


def test_a_text_encoder_without_tokenizer_is_one_sentence(labels, encoder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((encoder / name).read_bytes())
    message = failure("--labels", labels, "--text-encoder", bare, "-o", tmp_path / "router")
    assert "has no tokenizer that can be read (no tokenizer files); put its tokenizer" in message
    (bare / "tokenizer.json").write_text("{", encoding="utf-8")
    message = failure("--labels", labels, "--text-encoder", bare, "-o", tmp_path / "router")
    assert "has no tokenizer that can be read (Expecting property name" in message


def test_only_a_router_is_replaced(labels, encoder, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    given = ("--labels", labels, "--text-encoder", encoder, "--predictor", "linear", "-o", out)
    assert call(*given).exit_code == 0  # an empty folder
    assert call(*given).exit_code == 0  # a router
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    message = failure(*given, code=2)
    assert "holds 'thesis.txt', which is no part of a router; name a new folder" in message
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert (out / "router.json").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"mine", "labels.parquet"}


def test_a_place_where_nothing_can_be_written_is_said_before_training(labels, tmp_path):
    (tmp_path / "file").touch()
    for option in ("--out", "--work"):
        message = failure("--labels", labels, option, tmp_path / "file" / "new", code=2)
        assert f"nothing can be written in the folder {tmp_path / 'file'}" in message


def test_a_metric_that_few_prompts_are_rated_on_is_named(encoder, tmp_path):
    rows = [
        (f"a {word} {i}", model, metric, (i + len(model)) % 7 / 7)
        for i, word in enumerate(WORDS[:3] * 12)
        for model in ("small", "large")
        for metric in ("quality", "rare")
        if metric == "quality" or i < 14
    ]
    result = call(
        "--scores", write_csv(tmp_path / "scores.csv", rows), *PAIR, "--text-encoder", encoder,
        "--predictor", "linear", "-o", tmp_path / "router",
    )  # fmt: skip
    assert "22 of 36 prompts lack a rating" in result.stderr
    assert "on rare both are rated for 14, choose others with --metric" in result.stderr


def test_calibration_prompts_must_be_new(scores, encoder, tmp_path):
    prompts = {row[0] for row in read_csv(scores)}
    known = tmp_path / "known.txt"
    known.write_text("\n".join(prompts), encoding="utf-8")
    given = ("--scores", scores, *PAIR, "--text-encoder", encoder, "--calibration", known)
    assert "every prompt of --calibration is labelled already" in failure(*given, code=2)
