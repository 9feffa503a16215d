"""A split of several files, and what it has in common with one of one file."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from ptuning.data.cache import key_of
from ptuning.data.guess import FormatOptions
from ptuning.data.splits import load_split
from ptuning.errors import DataError

OPTIONS = FormatOptions()


@pytest.fixture
def files(tmp_path) -> list[str]:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.csv"
    one.write_text("\n".join(json.dumps({"prompt": f"a{i}", "response": "r"}) for i in range(3)), encoding="utf-8")
    other.write_text("question;answer\nb0;r\nb1;r\n", encoding="utf-8")
    return [str(one), str(other)]


def test_one_file_has_the_hash_and_the_key_of_earlier_versions(files):
    content = Path(files[0]).read_bytes()
    split = load_split("train", files[:1], OPTIONS)
    assert split.sha256 == hashlib.sha256(content).hexdigest()
    assert split.key == key_of(split.sha256, files[0], "FormatOptions", dataclasses.astuple(OPTIONS), None, False)
    again = load_split("train", files[0], OPTIONS)
    assert split == again


def test_several_files_one_after_the_other(files):
    split = load_split("train", files, OPTIONS)
    assert [r.prompt for r in split.records] == ["a0", "a1", "a2", "b0", "b1"]
    assert [r.source for r in split.records][2:4] == [f"{files[0]}:3", f"{files[1]}:2"]
    assert str(split) == (
        f"train: 5 rows of {files[0]}, {files[1]} ({files[0]}: columns prompt 'prompt', response 'response', guessed; "
        f"{files[1]}: columns prompt 'question', response 'answer', guessed)"
    )
    other_order = load_split("train", files[::-1], OPTIONS)
    assert {split.sha256, split.key}.isdisjoint({other_order.sha256, other_order.key})


def test_a_changed_file_is_noticed(files):
    before = load_split("train", files, OPTIONS)
    Path(files[1]).write_text("question;answer\nb0;r\nb1;R\n", encoding="utf-8")
    after = load_split("train", files, OPTIONS)
    assert before.sha256 != after.sha256 and before.key != after.key
    assert after.records[4].response == "R"


@pytest.mark.parametrize(
    ("limit", "prompts"), [(2, "a0 a1"), (3, "a0 a1 a2"), (4, "a0 a1 a2 b0"), (9, "a0 a1 a2 b0 b1")]
)
def test_the_first_rows_are_those_of_all_files_together(files, limit, prompts):
    split = load_split("train", files, OPTIONS, max_samples=limit)
    assert [r.prompt for r in split.records] == prompts.split()


def test_a_fault_names_its_file(files):
    Path(files[1]).write_text("question;answer\nb0;\nb1;r\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"{files[1]}:2: answer: is empty"):
        load_split("train", files, OPTIONS)
    split = load_split("train", files, OPTIONS, skip_invalid=True)
    assert split.skipped == 1 and len(split.records) == 4
    with pytest.raises(DataError, match="no such file"):
        load_split("train", [*files, "none.json"], OPTIONS, max_samples=1)
