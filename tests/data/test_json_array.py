"""A JSON array read in pieces gives the values, lines and messages of one read as a whole."""

import io
import json
import random

import pytest

from ptuning.data import json_array
from ptuning.data.json_array import array_values
from ptuning.data.problems import bad_json
from ptuning.errors import DataError

VALUES = ['衣服 "引号" \\ \n 😀', -12.5e3, 1234567, True, None, {"a": ["b", {}]}, [], "", {"键": "值" * 9}]


def random_array(rng: random.Random) -> str:
    values = rng.choices(VALUES, k=rng.randrange(8))
    space = lambda: rng.choice(["", " ", "\n", "\r\n \t", "\n\n"])  # noqa: E731
    items = [space() + json.dumps(v, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])) for v in values]
    return space() + "[" + ",".join(item + space() for item in items) + space() + "]" + space()


def in_pieces(monkeypatch, text: str, size: int) -> list:
    monkeypatch.setattr(json_array, "_CHUNK", size)
    return list(array_values("a.json", io.StringIO(text, newline="")))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_values_and_lines(monkeypatch, size):
    rng = random.Random(size)
    for _ in range(150):
        text = random_array(rng)
        whole = in_pieces(monkeypatch, text, 10**6)
        assert [value for _, value in whole] == json.loads(text)
        assert in_pieces(monkeypatch, text, size) == whole


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_faults(monkeypatch, size):
    """Wherever a file is damaged, the message has the line and column of the whole file, and what the decoder says."""
    rng = random.Random(size)
    for _ in range(300):
        text = random_array(rng)
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "}", "]", '"', ",", "x", "\\", "\n"]) + text[at + rng.randrange(3) :]
        if not text.lstrip().startswith("["):
            continue
        outcomes = []
        for chunk in (10**6, size):
            try:
                outcomes.append(in_pieces(monkeypatch, text, chunk))
            except DataError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if "Extra data" not in error.msg:
                assert outcomes[0] == str(bad_json("a.json", error))


def test_a_fault_does_not_pull_in_the_rest_of_the_file(monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 100)
    stream = io.StringIO('[{"a": "b"},\n{"a" "b"},\n' + '{"a": "c"},\n' * 10_000, newline="")
    with pytest.raises(DataError, match=r"^a.json:2: JSON: Expecting ':' delimiter at column 6"):
        list(array_values("a.json", stream))
    assert stream.tell() <= 300
