"""Prompts from files and from the starter world."""

from __future__ import annotations

import pytest

from cloud_server.errors import DataError
from cloud_server.training.labels import read_prompts, sample_prompts


def test_sampled_prompts_differ_and_ask_for_one_to_five_objects_evenly():
    prompts = sample_prompts(100, seed=1)
    assert len({prompt.text for prompt in prompts}) == 100
    assert [prompt.objects for prompt in prompts] == [1, 2, 3, 4, 5] * 20
    assert prompts == sample_prompts(100, seed=1)
    assert prompts[:10] == sample_prompts(10, seed=1)
    assert prompts != sample_prompts(100, seed=2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "a cat\n\n two dogs \r\na cat\n"),
        ("prompts.txt", "\ufeffa cat\ntwo dogs"),
        ("prompts.csv", 'id,prompt\n1,a cat\n2,two dogs\n3,"a cat"\n'),
        ("prompts.TSV", "prompt\tid\na cat\t1\ntwo dogs\t2\n"),
    ],
)
def test_prompts_are_read_once_each_and_in_order(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a cat", "two dogs"]


def test_a_prompt_in_a_table_may_hold_what_separates(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"a cat, a dog\nand a ""house"""\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv") == ['a cat, a dog\nand a "house"']


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.csv", b"prompt\n\n", "holds no prompt"),
        ("p.csv", b"text,id\na cat,1\n", "no column 'prompt', only 'text', 'id'"),
        ("p.csv", b"", "no column 'prompt', only nothing"),
        ("p.txt", b"a caf\xe9\n", "cannot read the prompts"),
    ],
)
def test_bad_files_of_prompts_are_one_sentence(tmp_path, name, text, told):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(DataError, match=told) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")


def test_only_the_end_of_a_line_ends_a_prompt(tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na dog\u2028on grass\na cow\x0cx\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv") == ["a dog\u2028on grass", "a cow\x0cx"]


def test_a_head_line_that_is_too_long_is_one_sentence(tmp_path):
    (tmp_path / "p.csv").write_text("prompt," + "x" * 200_000 + "\na cat,1\n")
    with pytest.raises(DataError, match=r"p\.csv is damaged"):
        read_prompts(tmp_path / "p.csv")
