"""The file of labels: what goes in comes out, and what is wrong is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud_server.errors import DataError
from cloud_server.training.labels import Labels, join, read, read_for_training, write
from cloud_server.training.quality import Metric

METRICS = (Metric("Sharp", "Sharp photo", "Blurry photo", 0.25), Metric("Bold", "a", "b", 0.75))


def made_up(prompts=4, seeds=3, metrics=METRICS):
    q = np.random.default_rng(0).random((2, prompts, seeds, len(metrics)))
    return Labels(
        q.astype(np.float32).astype(np.float64),
        tuple(f"prompt {i}, größer" for i in range(prompts)),
        tuple(range(seeds)),
        tuple(metric.name for metric in metrics),
        "abc",
        metrics,
        {"models": {"edge": {"digest": "e"}}, "versions": {"torch": "2.13.0"}},
    )


@pytest.fixture
def file(tmp_path):
    write(made_up(), tmp_path / "labels.parquet")
    return tmp_path / "labels.parquet"


def change(file, edit):
    """Write the table of a file again as `edit` makes it."""
    table = pq.read_table(file)
    pq.write_table(edit(table).replace_schema_metadata(table.schema.metadata), file)


def test_labels_come_back_as_they_were_written(file):
    labels, again = made_up(), read(file)
    np.testing.assert_array_equal(again.q, labels.q)
    np.testing.assert_allclose(again.weights, [0.25, 0.75])
    for name in ("prompts", "seeds", "metrics", "digest", "described", "origin"):
        assert getattr(again, name) == getattr(labels, name)


def more_of_the_edge():
    """Labels of one picture of every prompt by the cloud and three by the edge."""
    labels = made_up()
    labels.q[1, :, 1:] = np.nan
    return labels


def test_the_edge_may_have_drawn_more(tmp_path):
    labels = more_of_the_edge()
    write(labels, tmp_path / "labels.parquet")
    assert pq.read_table(tmp_path / "labels.parquet").num_rows == 4 * (3 + 1)
    again = read_for_training(tmp_path / "labels.parquet")
    np.testing.assert_array_equal(again.q, labels.q)
    assert again.drawn.sum(2).tolist() == [[3] * 4, [1] * 4]
    np.testing.assert_allclose(again.mean[0], labels.q[0].mean(1))
    np.testing.assert_array_equal(again.mean[1], labels.q[1, :, 0])


def test_a_picture_that_the_cloud_has_of_some_prompts_only_is_missed(tmp_path):
    labels = more_of_the_edge()
    labels.q[1, 2, 1] = 0.5
    write(labels, tmp_path / "labels.parquet")
    told = "17 rows and not one for each of 4 prompts with 3 seeds of the edge and 2 of the cloud"
    with pytest.raises(DataError, match=told):
        read(tmp_path / "labels.parquet")


def test_the_order_of_rows_does_not_matter(file):
    before = read(file)
    change(file, lambda table: table.sort_by([("Sharp", "ascending")]))
    after = read(file)
    order = [after.prompts.index(prompt) for prompt in before.prompts]
    np.testing.assert_array_equal(after.q[:, order], before.q)


def test_equal_labels_give_equal_bytes_and_no_half_file_is_left(file, tmp_path):
    write(made_up(), tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_anybody_can_read_the_table(file):
    table = pq.read_table(file)
    assert table.column_names == ["model", "prompt", "seed", "Sharp", "Bold"]
    row = table.slice(5, 1).to_pylist()[0]
    labels = made_up()
    assert (row["model"], row["prompt"], row["seed"]) == ("edge", labels.prompts[1], 2)
    assert row["Sharp"] == labels.q[0, 1, 2, 0]
    facts = json.loads(table.schema.metadata[b"routet2i"])
    assert facts["format"] == 1
    assert facts["metrics"][0]["positive"] == "Sharp photo"


def test_three_thousand_prompts_fit_in_five_megabytes(tmp_path):
    metrics = tuple(Metric(f"M{i}", "a", "b", 1.0) for i in range(11))
    write(made_up(3000, 4, metrics), tmp_path / "big.parquet")
    assert (tmp_path / "big.parquet").stat().st_size < 5_000_000


def test_without_descriptions_metrics_weigh_alike(tmp_path):
    labels = Labels(np.random.default_rng(0).random((2, 2, 1, 2)), ("a", "b"), (0,), ("x", "y"), "")
    assert labels.weights.tolist() == [0.5, 0.5]
    write(labels, tmp_path / "l.parquet")
    assert read(tmp_path / "l.parquet").weights.tolist() == [0.5, 0.5]


def only(column, value):
    return lambda table: table.filter(pa.compute.equal(table[column], value))


def without(*columns):
    return lambda table: table.drop_columns(list(columns))


def with_column(name, values):
    def edit(table):
        return table.set_column(table.column_names.index(name), name, values(table[name]))

    return edit


def spoiled(value):
    def values(column):
        numbers = column.to_numpy().copy()
        numbers[7] = value
        return pa.array(numbers)

    return values


def with_null(column):
    values = column.to_pylist()
    return pa.array([*values[:7], None, *values[8:]])


def test_whole_numbers_are_numbers(file):
    change(file, with_column("Bold", lambda column: pa.array([0, 1] * (len(column) // 2))))
    assert set(read(file).q[..., 1].ravel()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ((METRICS[0], replace(METRICS[1], weight="much")), "'Bold' the weight 'much'; it needs a"),
        ((METRICS[0], replace(METRICS[1], weight=-1.0)), "'Bold' the weight -1.0"),
        ((METRICS[0], replace(METRICS[1], weight=float("nan"))), "'Bold' the weight nan"),
        ((METRICS[0], METRICS[0]), "describes the metric 'Sharp' twice"),
    ],
)
def test_metrics_that_are_described_wrongly_are_one_sentence(tmp_path, metrics, told):
    write(replace(made_up(), described=metrics), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=told):
        read(tmp_path / "labels.parquet")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (only("model", "edge"), "no labels of the model 'cloud'"),
        (only("model", "cloud"), "no labels of the model 'edge'"),
        (without("Sharp"), "no column 'Sharp'"),
        (without("prompt"), "no column 'prompt'"),
        (with_column("Sharp", spoiled(np.nan)), r"nan as Sharp of 'prompt 2, größer' \(edge, seed"),
        (with_column("Bold", spoiled(np.inf)), "inf as Bold"),
        (with_column("Bold", lambda c: pa.array(["high"] * len(c))), "has string in column 'Bold'"),
        (lambda table: table.slice(0, 23), "has 23 rows and not one for each of 4 prompts"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "has 25 rows"),
        (lambda table: table.slice(0, 0), "no labels of the model 'edge'"),
        (with_column("prompt", with_null), "a row without prompt; label again or drop the row"),
        (with_column("seed", with_null), "a row without seed"),
    ],
)
def test_a_table_that_is_wrong_is_one_sentence(file, edit, told):
    change(file, edit)
    with pytest.raises(DataError, match=told) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (None, "holds no labels; cloud-server label writes them"),
        (b"{", "holds no labels"),
        (b'{"format": 2, "metrics": []}', "has format 2 and this version reads 1"),
        (b'{"format": 1}', "does not describe its metrics"),
        (b'{"format": 1, "metrics": []}', "does not describe its metrics"),
        (b"[1]", "holds no labels"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(file, facts, told):
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({b"routet2i": facts} if facts else {}), file)
    with pytest.raises(DataError, match=told):
        read(file)


@pytest.mark.parametrize("content", [None, b"", b"prompt,q\na,1\n", b"PAR1"])
def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path, content):
    file = tmp_path / "labels.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the labels in"):
        read(file)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        write(made_up(), tmp_path / "none" / "labels.parquet")


def flat(labels, where, value):
    labels.q[where] = value
    return labels


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (made_up(prompts=1), "one prompt only"),
        (flat(made_up(), (..., 1), 0.5), "metric 'Bold' is 0.5 for every picture"),
        (flat(made_up(), (1,), made_up().q[0]), "are they one model"),
    ],
)
def test_training_refuses_labels_that_teach_nothing(tmp_path, labels, told):
    write(labels, tmp_path / "l.parquet")
    assert read(tmp_path / "l.parquet").metrics == ("Sharp", "Bold")
    with pytest.raises(DataError, match=told) as caught:
        read_for_training(tmp_path / "l.parquet")
    assert str(caught.value).startswith(str(tmp_path / "l.parquet"))


def test_training_takes_labels_that_teach_something(file):
    assert read_for_training(file).q.shape == (2, 4, 3, 2)


def compared_with(seed):
    """Return an origin in which alignment drew its distractors with a seed."""
    return {**made_up().origin, "scorer": {"digest": "c", "alignment": {"seed": seed}}}


def test_more_prompts_with_fewer_seeds_are_joined():
    labels = made_up()
    labels = replace(labels, origin=compared_with(0))
    prompts = (labels.prompts[1], "new", "newer")
    more = replace(
        made_up(prompts=3, seeds=1), prompts=prompts, digest="def", origin=compared_with(1)
    )
    both = join([labels, more])
    assert both.prompts == (*labels.prompts, "new", "newer")
    assert both.drawn.tolist() == [[[True] * 3] * 4 + [[True, False, False]] * 2] * 2
    np.testing.assert_allclose(both.mean[:, :4], labels.q.mean(2))
    np.testing.assert_array_equal(both.mean[:, 4:], more.q[:, 1:, 0])
    assert len({labels.digest, more.digest, both.digest}) == 3
    assert join([labels]) is labels


def test_labels_of_other_models_or_metrics_are_not_joined(tmp_path):
    known = made_up().origin
    others = {
        "of other models": replace(made_up(), origin={"models": {"edge": {"digest": "other"}}}),
        "of other metrics": replace(made_up(), described=METRICS[::-1]),
        "by another CLIP": replace(made_up(), origin={**known, "scorer": {"digest": "other"}}),
    }
    write(made_up(), tmp_path / "one.parquet")
    for what, other in others.items():
        write(other, tmp_path / "two.parquet")
        with pytest.raises(DataError, match=rf"two\.parquet: labels {what} cannot be"):
            read_for_training(tmp_path / "one.parquet", tmp_path / "two.parquet")
