"""General rows mixed into the training rows: how many, which, where, and what is printed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from ptuning.config import parse
from ptuning.config.checks import parse_mix
from ptuning.data.guess import FormatOptions
from ptuning.data.splits import Split, load_split, mixed
from ptuning.errors import ConfigError, DataError

LAYOUT = FormatOptions(prompt="content", response="summary")


def write(folder: Path, name: str, count: int, columns: tuple[str, str] = ("content", "summary")) -> str:
    path = folder / name
    rows = [json.dumps({columns[0]: f"{name} {i}", columns[1]: "b"}) for i in range(count)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path) -> Split:
    return load_split("train", write(tmp_path, "train.jsonl", 50), LAYOUT)


def test_ratio_rows_for_each_training_row(tmp_path, train):
    general = write(tmp_path, "general.jsonl", 30)
    result = mixed(train, [f"{general}:0.2"], 42, LAYOUT)
    others = [r for r in result.records if r not in train.records]
    assert len(others) == len(set(others)) == 10
    assert [r for r in result.records if r in train.records] == train.records
    assert str(result) == f"train: 50 rows of {train.file} + 10 of 30 rows of {general} (ratio 0.2)"
    places = [i for i, r in enumerate(result.records) if r in others]
    assert places[0] < 20 and places[-1] > 40, "they stand all over the training rows"
    assert [r.source for r in others] != sorted(r.source for r in others)


def test_too_few_rows_are_repeated_evenly(tmp_path, train):
    general = write(tmp_path, "general.jsonl", 8)
    result = mixed(train, [f"{general}:0.4"], 42, LAYOUT)
    counts = Counter(r for r in result.records if r not in train.records)
    assert sum(counts.values()) == 20 and set(counts.values()) == {2, 3}
    assert str(result).endswith(f" + 20 of 8 rows of {general} (ratio 0.4, each about 2.5 times)")


def test_several_files_each_in_its_own_format(tmp_path, train):
    same = write(tmp_path, "same.jsonl", 9)
    chat = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    chat.write_text(json.dumps([{"messages": messages}] * 4), encoding="utf-8")
    result = mixed(train, [f"{same}:0.1", f"{chat}:0.001"], 42, LAYOUT)
    assert len(result.records) == 50 + 5 + 1
    assert str(result).endswith(
        f" + 5 of 9 rows of {same} (ratio 0.1) + 1 of 4 rows of {chat} (OpenAI messages, guessed) (ratio 0.001)"
    )


def test_the_draw_depends_on_the_seed_alone_and_the_hash_on_files_and_ratios(tmp_path, train):
    general = write(tmp_path, "general.jsonl", 30)
    one, again = (mixed(train, [f"{general}:0.2"], 42, LAYOUT) for _ in range(2))
    assert one == again
    other_seed = mixed(train, [f"{general}:0.2"], 43, LAYOUT)
    assert other_seed.records != one.records and other_seed.sha256 == one.sha256
    hashes = {train.sha256, one.sha256, mixed(train, [f"{general}:0.1"], 42, LAYOUT).sha256}
    write(tmp_path, "general.jsonl", 31)
    hashes.add(mixed(train, [f"{general}:0.2"], 42, LAYOUT).sha256)
    assert len(hashes) == 4
    assert mixed(train, [], 42, LAYOUT) is train


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("general.json", "--mix general.json: expected FILE:RATIO, e.g. --mix general.json:0.1"),
        ("general.json:", "--mix general.json:: expected FILE:RATIO, e.g. --mix general.json:0.1"),
        (":0.1", "--mix :0.1: expected FILE:RATIO"),
        ("a.json:much", "--mix a.json:much: expected FILE:RATIO, e.g. --mix a.json:0.1"),
        ("a.json:nan", "--mix a.json:nan: expected FILE:RATIO"),
        ("a.json:0", "the ratio is 0; use a number above 0 (rows of a.json for each row of --train_file), e.g. 0.1"),
        ("a.json:-1", "the ratio is -1; use a number above 0"),
        ("a.json:inf", "the ratio is inf; use a number above 0"),
    ],
)
def test_what_is_no_mix(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_mix(text)
    assert problem in str(caught.value)


def test_the_option_is_checked_before_anything_is_read():
    argv = ["--do_train", "--model_name_or_path", "m", "--train_file", "t.json", "--output_dir", "out"]
    config, _ = parse([*argv, "--mix", "a.json:0.1", "b.json:2"])
    assert config.data.mix == ["a.json:0.1", "b.json:2"] and config.data.prompt_column is None
    with pytest.raises(ConfigError, match=r"--mix b\.json: expected FILE:RATIO"):
        parse([*argv, "--mix", "a.json:0.1", "b.json"])


def test_a_colon_in_the_path_is_kept():
    assert parse_mix(r"C:\data\a.json:0.5") == (r"C:\data\a.json", 0.5)


def test_bad_rows_of_a_mixed_file_are_refused_or_skipped(tmp_path, train):
    path = tmp_path / "general.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 5}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"general.jsonl:2: response: is the number 5"):
        mixed(train, [f"{path}:0.02"], 42, LAYOUT)
    result = mixed(train, [f"{path}:0.02"], 42, LAYOUT, skip_invalid=True)
    assert str(result).endswith("(ratio 0.02), 1 invalid rows skipped")
