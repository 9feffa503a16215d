"""Files of a run: whole after a kill, read strictly where they must be right."""

import hashlib
import os

import pytest

from ptuning.errors import DataError
from ptuning.runs.files import (
    read_json,
    read_json_if_possible,
    sha256_of,
    version_of,
    versions,
    write_atomically,
    write_json,
    write_text,
)
from ptuning.runs.lines import Lines, ResumableLines, append, delete_parts, read_lines, write_lines


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = write_text(tmp_path / "new" / "a.json", "old")

    def torn(path):
        path.write_text("ha")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        write_atomically(target, torn)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("I/O error")))
    with pytest.raises(OSError):
        write_text(target, "new")
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]


def test_written_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    target, seen, fsync = tmp_path / "a", [], os.fsync

    def watched(descriptor):
        seen.append(target.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_text(target, "text")
    assert seen[0] is False and seen[1:] == [True]  # the file, then the folder


def test_the_file_is_as_public_as_others(tmp_path):
    (tmp_path / "other").write_text("x")
    mode = write_text(tmp_path / "a", "x").stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode


def test_a_lone_surrogate_is_written(tmp_path):
    assert write_text(tmp_path / "a", "中\ud83d").read_text(encoding="utf-8") == "中?"


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_strict_and_lenient_reading(tmp_path, content):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json_if_possible(path) == {}
    with pytest.raises(DataError) as caught:
        read_json(path, "write it again")
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith(": write it again")
    write_json(path, {"a": "中"})
    assert read_json(path, "") == read_json_if_possible(path) == {"a": "中"}


@pytest.mark.parametrize(
    ("text", "place"),
    [('{"a": 1}\n\n{"a": \n', ":3: JSON: "), ("{}\n[1]\n", ":2: row: is a list"), (None, ": can't be read")],
)
def test_a_bad_line_is_named(tmp_path, text, place):
    path = tmp_path / "x.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"write it again$") as caught:
        list(read_lines(path, "write it again"))
    assert f"{path}{place}" in str(caught.value)
    assert len([value for _, value in Lines(path)]) == (0 if text is None else 1)


def test_lines_come_back(tmp_path):
    lines = [{"a": 1}, {"b": "中\u2028"}]
    write_lines(tmp_path / "x.jsonl", lines)
    assert [line for _, line in read_lines(tmp_path / "x.jsonl", "")] == lines
    assert [line for _, line in Lines(tmp_path / "x.jsonl")] == lines


def test_a_damaged_line_among_kept_ones_is_made_again(tmp_path):
    parts = ResumableLines(tmp_path / "predictions.jsonl", "key")
    with parts.open(0) as file:
        append(file, {"index": 3})
        file.write("{damaged\n[1]\n")
        append(file, {"index": 5})
        file.write('{"index": 7, "cut')
    assert sorted(parts.read()) == [3, 5]
    with parts.open(0) as file:
        append(file, {"index": 8})
    assert sorted(parts.read()) == [3, 5, 8]
    delete_parts(parts.path)
    assert not list(tmp_path.iterdir())


def test_sha256_and_versions(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert version_of("no-such-package") == "not installed"
    assert list(versions(("torch",))) == ["python", "torch"] and versions()["torch"][0].isdigit()
