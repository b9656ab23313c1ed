from __future__ import annotations

import csv

import numpy as np
import pytest

from cloud_server.errors import DataError
from cloud_server.training.router import check
from cloud_server.training.scores import read_scores

MODELS = ("small", "large", "other")


def write(file, rows, head=("prompt", "model", "metric", "score")):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([head, *rows])
    return file


def ratings(prompts=12, metrics=("quality", "alignment")):
    rng = np.random.default_rng(0)
    return [
        [f"prompt, {i}\nof two lines", model, metric, f"{rng.uniform():.4f}"]
        for i in range(prompts)
        for model in MODELS
        for metric in metrics
    ]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "scores.csv"


def test_two_models_of_a_table_become_labels_of_one_picture_each(file):
    rows = ratings()
    scores = read_scores(write(file, rows))
    labels = scores.pair("small", "large", ["alignment"])
    assert labels.q.shape == (2, 12, 1, 1)
    assert labels.metrics == ("alignment",)
    assert labels.weights.tolist() == [1.0]
    assert labels.prompts[0] == "prompt, 0\nof two lines"
    by_name = {tuple(row[:3]): float(row[3]) for row in rows}
    for i, prompt in enumerate(labels.prompts):
        assert labels.q[0, i, 0, 0] == by_name[prompt, "small", "alignment"]
        assert labels.q[1, i, 0, 0] == by_name[prompt, "large", "alignment"]
    check(labels)


def test_without_a_choice_all_metrics_that_both_models_have_count_alike(file):
    rows = [row for row in ratings() if row[1:3] != ["large", "quality"]]
    scores = read_scores(write(file, rows))
    assert scores.pair("small", "large").metrics == ("alignment",)
    assert scores.pair("small", "other").metrics == ("alignment", "quality")
    assert scores.pair("small", "other").weights.tolist() == [0.5, 0.5]


def test_prompts_that_one_of_the_two_lacks_are_left_out(file):
    rows = [row for row in ratings() if not (row[0].startswith("prompt, 3") and row[1] == "large")]
    labels = read_scores(write(file, rows)).pair("small", "large")
    assert len(labels.prompts) == 11
    assert np.isfinite(labels.q).all()
    assert not any(prompt.startswith("prompt, 3") for prompt in labels.prompts)


def test_the_rest_of_the_table_is_what_else_is_known(file):
    rows = ratings()
    rows = [row for row in rows if not (row[0].startswith("prompt, 3") and row[1] == "other")]
    rows += [[row[0], "other", "constant", "0.5"] for row in rows[::6]]
    scores = read_scores(write(file, rows))
    labels = scores.pair("small", "large", ["alignment"])
    related = scores.related(labels, "small", "large")
    # quality of the pair, and both metrics of the other model
    assert related.shape == (12, 4)
    assert np.isnan(related[3]).sum() == 2
    used = labels.q[:, :, 0, 0]
    for column in related.T:
        assert not any(np.array_equal(column, each) for each in used)


def test_another_pair_metric_or_file_has_another_digest(file, tmp_path):
    scores = read_scores(write(file, ratings()))
    other = read_scores(write(tmp_path / "other.csv", ratings(13)))
    digests = [
        scores.pair("small", "large").digest,
        scores.pair("large", "small").digest,
        scores.pair("small", "large", ["quality"]).digest,
        other.pair("small", "large").digest,
    ]
    assert len(set(digests)) == 4
    assert scores.pair("small", "large").digest == digests[0]


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (("tiny", "large"), "no edge model 'tiny'; it has large, other, small"),
        (("small", "huge"), "no cloud model 'huge'; it has large, other, small"),
        (("small", "large", ["beauty"]), "no metric 'beauty'; it has alignment, quality"),
        (("small", "small"), "edge and cloud are both small; name two of large, other, small"),
    ],
)
def test_a_name_that_is_not_in_the_table_is_answered_with_those_that_are(file, choice, sentence):
    with pytest.raises(DataError, match=sentence):
        read_scores(write(file, ratings())).pair(*choice)


def test_models_without_a_common_prompt_are_no_pair(file):
    rows = [row for row in ratings() if row[1] != "large" or row[0] == "nowhere"]
    rows += [["elsewhere", "large", "quality", "0.5"]]
    scores = read_scores(write(file, rows))
    with pytest.raises(DataError, match="no prompt that small and large are both rated on"):
        scores.pair("small", "large", ["quality"])


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        ("nan", r"the score 'nan' in line 2 of .* is not a number"),
        ("", r"line 2 of .* has no score; fill it in or drop the line"),
        ("inf", r"the score 'inf' in line 2"),
        ("good", r"the score 'good' in line 2"),
        ("4.5", r"the score 4.5 of quality in line 2 of .* is outside 0 to 1; bring"),
        ("-0.1", r"the score -0.1 of quality"),
    ],
)
def test_a_score_that_is_none_is_named_with_its_line(file, score, sentence):
    with pytest.raises(DataError, match=sentence):
        read_scores(write(file, [["a cat", "small", "quality", score]]))


def test_a_row_that_ends_early_is_named_with_its_line(file):
    columns = ("model", "score", "metric", "prompt")
    with pytest.raises(DataError, match=r"line 3 of .* has no prompt; fill it in"):
        read_scores(
            write(file, [["small", 1, "quality", "a cat"], ["small", 1, "quality"]], columns)
        )


def test_a_table_with_other_columns_says_which_are_missing(file):
    with pytest.raises(DataError, match="no column 'metric' but prompt, model, rating; its first"):
        read_scores(write(file, [["a cat", "small", 1]], ("prompt", "model", "rating")))


def test_an_empty_a_binary_and_a_missing_file_are_one_sentence(file):
    with pytest.raises(DataError, match="has no scores"):
        read_scores(write(file, []))
    file.write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(DataError, match="cannot read the scores in"):
        read_scores(file)
    with pytest.raises(DataError, match="cannot read the scores in"):
        read_scores(file.with_name("none.csv"))


def test_a_prompt_rated_twice_is_refused(file):
    row = ["a cat", "small", "quality", "0.5"]
    with pytest.raises(DataError, match="rates small on quality twice for 'a cat'; average"):
        read_scores(write(file, [row, row]))
