"""Rows of Arrow tables: Parquet, Arrow, folders of save_to_disk, and datasets. Faults name the row."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from ptuning.data.formats import FORMATS, Columns
from ptuning.data.guess import FormatOptions
from ptuning.data.records import read_records
from ptuning.data.rows import fingerprint, iterate_rows, size
from ptuning.data.splits import load_split
from ptuning.errors import DataError

COLUMNS = Columns("prompt", "response", "history")
ROWS = [
    {"prompt": f"问{i}", "response": f"答{i}", "history": [["早", "早！"]] if i % 2 else [], "n": i}
    for i in range(2500)
]


def parquet(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    return str(path)


def arrow_stream(path: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def arrow_file(path: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def saved(path: Path, rows: list[dict]) -> str:
    Dataset.from_list(rows).save_to_disk(path.with_suffix(""), num_shards=min(len(rows), 2))
    return str(path.with_suffix(""))


def of_the_hub(path: Path, rows: list[dict]) -> str:
    """A folder stands for the hub: `datasets` reads both alike."""
    path.with_suffix("").mkdir()
    parquet(path.with_suffix("") / "train.parquet", rows)
    return f"dataset:{path.with_suffix('')}:train"


KINDS = pytest.mark.parametrize(
    ("write", "name"),
    [
        (parquet, "a.parquet"),
        (arrow_stream, "a.arrow"),
        (arrow_file, "a.arrow"),
        (saved, "a.saved"),
        (of_the_hub, "a.hub"),
    ],
)


def refusal(name: str, columns=COLUMNS) -> str:
    with pytest.raises(DataError) as caught:
        read_records(name, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@KINDS
def test_rows_are_those_of_json_lines(tmp_path, write, name):
    source, lines = write(tmp_path / name, ROWS), tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    found, expected = read_records(source, COLUMNS)[0], read_records(lines, COLUMNS)[0]
    assert [r.source for r in found] == [f"{source}:{i}" for i in range(1, len(ROWS) + 1)]
    assert [(r.prompt, r.response, r.history) for r in found] == [(r.prompt, r.response, r.history) for r in expected]


@KINDS
def test_faults_name_the_row_and_the_column(tmp_path, write, name):
    source = write(tmp_path / name, [*ROWS[:2], {**ROWS[2], "response": None}, {**ROWS[3], "prompt": " "}])
    with pytest.raises(DataError) as caught:
        read_records(source, COLUMNS)
    assert str(caught.value).splitlines()[:3] == [
        f"{source}: 2 problems in 2 of 4 rows",
        f"  {source}:3: response: is null: write a text or delete the row",
        f"  {source}:4: prompt: is only white space (' '): write a text or delete the row",
    ]
    assert "answer: no row has this column, the columns are 'prompt', 'response'" in refusal(
        source, Columns("prompt", "answer")
    )


@KINDS
def test_the_fingerprint_changes_with_the_rows(tmp_path, write, name):
    hashes = set()
    for number, rows in enumerate((ROWS[:5], ROWS[:6])):
        folder = tmp_path / str(number)
        folder.mkdir()
        hashes.add(fingerprint(write(folder / name, rows)))
    assert len(hashes) == 2


def test_chats_of_parquet_and_progress(tmp_path):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    source = parquet(tmp_path / "a.parquet", [{"messages": messages}] * 3)
    (first, *_), _ = read_records(source, FormatOptions())
    assert (first.prompt, first.response) == ("你好", "好")
    assert read_records(source, FormatOptions("openai"))[0][2].source.endswith(":3")
    assert FORMATS["openai"].fits([row for _, row in iterate_rows(source)])
    told = []
    assert list(iterate_rows(source, progress=told.append))
    assert told[-1] == size(source)


@pytest.mark.parametrize(("name", "what"), [("a.parquet", "Parquet"), ("a.arrow", "Arrow")])
@pytest.mark.parametrize("content", [b"", b'{"prompt": "a"}', b"PAR1 and more", b"ARROW1\0\0 and more"])
def test_damaged_files(tmp_path, name, what, content):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(str(path))
    assert message.startswith(f"{path}: can't be read as {what} (")
    assert message.endswith("): make or download it again")


def test_files_cut_short(tmp_path):
    for source in (parquet(tmp_path / "a.parquet", ROWS), arrow_stream(tmp_path / "a.arrow", ROWS)):
        content = Path(source).read_bytes()
        Path(source).write_bytes(content[: len(content) // 2])
        assert "make or download it again" in refusal(source)


def test_a_missing_file_says_so(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        assert refusal(str(tmp_path / name)).endswith(f"no such file in {tmp_path}: correct the path")


def test_a_folder_with_splits_names_them(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "d")
    message = refusal(str(tmp_path / "d"))
    assert message == (
        f"{tmp_path}/d: this folder holds the splits 'test', 'train': name one of them: {tmp_path}/d/test"
    )
    assert len(read_records(tmp_path / "d" / "train", COLUMNS)[0]) == 3
    next((tmp_path / "d" / "train").glob("*.arrow")).unlink()
    message = refusal(str(tmp_path / "d" / "train"))
    assert message.startswith(f"{tmp_path}/d/train: can't be read as a folder of save_to_disk (")


def test_a_saved_folder_is_hashed_by_its_arrow_files(tmp_path):
    folder = saved(tmp_path / "a.saved", ROWS[:10])
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.arrow")):
        digest.update(file.read_bytes())
    assert fingerprint(folder) == digest.hexdigest()
    assert size(folder) == sum(file.stat().st_size for file in Path(folder).glob("*.arrow"))


def test_splits_and_configurations_of_a_dataset(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(ROWS[3]), encoding="utf-8")
    (folder / "dev.jsonl").write_text(json.dumps(ROWS[1]), encoding="utf-8")
    split = load_split("validation", f"dataset:{folder}:validation", COLUMNS)
    assert split.records[0].prompt == "问1" and split.file == f"dataset:{folder}:validation"
    message = refusal(f"dataset:{folder}:test")
    assert message == (
        f"dataset:{folder}:test: can't be read: Unknown split \"test\". Should be one of ['train', 'validation']: name one of "
        f"them where a file is asked for (--test_file dataset:{folder}:SPLIT)"
    )
    message = refusal(f"dataset:{folder}:zh:train")
    assert message.endswith("'zh' not found. Available: ['default']: give one of them with --dataset_config_name")


def test_a_dataset_that_can_not_be_reached(tmp_path):
    message = refusal("dataset:owner/name:train")
    assert message == (
        "dataset:owner/name:train: Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled): correct the name, or "
        "download it where there is network (hf download --repo-type dataset owner/name --local-dir DIR), and give DIR in its "
        "place (--dataset_name DIR)"
    )
    for name in (f"dataset:{tmp_path}/none:train", "dataset:./none:train"):
        assert "no such folder" in refusal(name)
    assert "expected dataset:NAME:SPLIT or" in refusal("dataset:owner/name")


def test_a_dataset_whose_files_are_broken(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"\n{', encoding="utf-8")
    message = refusal(f"dataset:{folder}:train")
    assert message.startswith(f"dataset:{folder}:train: can't be read: ")
    assert message.endswith(": give its files instead (--train_file FILE …), whose faults are named by line")


def test_code_of_a_dataset_is_not_run(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "d.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    assert refusal(f"dataset:{folder}:train").startswith(f"dataset:{folder}:train: ")
    assert not (tmp_path / "ran").exists()
