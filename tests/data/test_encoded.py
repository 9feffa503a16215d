"""Encoded rows lie on disk: made once, the same as in memory, and made again when anything they depend on has changed."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from ptuning.data import encoded as encoded_module
from ptuning.data import splits as splits_module
from ptuning.data.batch import RowDataset
from ptuning.data.cache import ABOUT, cache_folder
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.encoded import encode_split, rows_sha256
from ptuning.data.guess import FormatOptions
from ptuning.data.records import read_records
from ptuning.data.splits import Split, load_split, mixed
from ptuning.errors import ConfigError, DataError
from ptuning.families.chatglm2.template import ChatGLM2Template

OPTIONS = FormatOptions()
HISTORY = [["早 abc", "龘很好龘"], ["旧", "龘百搭😀龘"]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def template(tiny_tokenizer) -> ChatGLM2Template:
    return ChatGLM2Template(tiny_tokenizer)


@pytest.fixture
def file(tmp_path) -> Path:
    rows = [
        {
            "prompt": f"问题 {i} " + "好" * (i % 40),
            "response": f"答案 {i} " + "很" * (i % 30),
            "history": HISTORY[: i % 3],
        }
        for i in range(2500)
    ]
    return write(tmp_path / "train.jsonl", rows)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def load(file: Path, **options) -> Split:
    return load_split("train", str(file), OPTIONS, **options)


def never(*args, **kwargs):
    raise AssertionError("this should have come from the cache")


def folders() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir())


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_rows_on_disk_are_those_in_memory(file, template, loss_on):
    encoder = Encoder(template, Lengths(60, 20), "请：", loss_on)
    split = load(file)
    found = encode_split(split, encoder)
    records, _ = read_records(file, OPTIONS)
    rows, report = encoder.training_rows(records)
    assert split.records == records and split.records[-1] == records[-1] and split.records[3:5] == records[3:5]
    assert found.report == report and report.dropped_turns and report.cut_questions and report.cut_answers
    for row, expected in zip(found.rows, rows, strict=True):
        assert (row.input_ids, row.labels, row.source) == (expected.input_ids, expected.labels, expected.source)
    assert found.rows.lengths.tolist() == [len(row.input_ids) for row in rows]
    counts = [sum(label != IGNORE for label in row.labels) for row in rows]
    assert found.rows.label_counts.tolist() == counts
    batch = RowDataset(found.rows)
    assert batch[7] == RowDataset(rows)[7] and batch.lengths is found.rows.lengths
    assert found.summary["turns"] == sum(len(record.history) + 1 for record in records)
    assert found.summary["answer_tokens"]["max"] == max(counts)
    assert found.summary["prompt_tokens"]["mean"] == round((report.tokens - sum(counts)) / len(rows), 1)


def test_prompts_and_answers_of_the_same_rows(file, template):
    encoder = Encoder(template, Lengths(60, 20), loss_on="all")
    split = load(file, max_samples=50)
    rows = encode_split(split, encoder).rows
    prompts, answers = rows.as_part("prompt"), rows.as_part("answer")
    expected, _ = encoder.prompt_rows(split.records)
    assert [(row.input_ids, row.labels) for row in prompts] == [(row.input_ids, []) for row in expected]
    expected, _ = Encoder(template, Lengths(60, 20)).training_rows(split.records)
    assert [(row.input_ids, row.labels) for row in answers] == [(row.input_ids, row.labels) for row in expected]
    assert prompts.lengths.tolist() == [len(row.input_ids) for row in prompts]
    assert answers.label_counts.tolist() == [len(row.labels) - row.labels.count(IGNORE) for row in expected]


def test_the_second_start_reads_and_encodes_nothing(file, template, monkeypatch, capfd):
    bad = {"prompt": "", "response": "b"}
    write(file, [bad, *map(json.loads, file.read_text().splitlines())])
    encoder = Encoder(template, Lengths(60, 20))
    split = load(file, skip_invalid=True)
    first = encode_split(split, encoder)
    assert split.skipped == 1
    with monkeypatch.context() as patch:
        patch.setattr(splits_module, "valid_records", never)
        patch.setattr(splits_module, "find_format", never)
        patch.setattr(encoded_module, "_encode", never)
        again = load(file, skip_invalid=True)
        second = encode_split(again, encoder)
    assert str(again) == str(split) and again == split
    assert (second.report, second.summary, second.rows.sha256) == (first.report, first.summary, first.rows.sha256)
    assert list(second.rows) == list(first.rows)
    assert len(folders()) == 2
    seen = capfd.readouterr()
    assert seen.out == seen.err == ""


def test_whatever_rows_depend_on_makes_them_anew(file, template, real_tokenizer):
    def sha(encoder: Encoder, **options) -> str:
        return encode_split(load(file, max_samples=20, **options), encoder).rows.sha256

    lengths = Lengths(60, 20)
    hashes = [
        sha(Encoder(template, lengths)),
        sha(Encoder(template, Lengths(50, 20))),
        sha(Encoder(template, Lengths(60, 5))),
        sha(Encoder(template, lengths, "请：")),
        sha(Encoder(template, lengths, loss_on="all")),
        sha(Encoder(ChatGLM2Template(real_tokenizer), lengths)),
    ]
    text = file.read_text()
    file.write_text(text.replace("答案 3", "答案 7", 1))
    hashes.append(sha(Encoder(template, lengths)))
    assert len(set(hashes)) == 7
    file.write_text(text)
    assert sha(Encoder(template, lengths)) == hashes[0]


def test_a_template_that_writes_otherwise_makes_them_anew(file, template):
    class Other(ChatGLM2Template):
        def render(self, dialogue):
            return super().render(dialogue)[::-1]

    split = load(file, max_samples=20)
    hashes = {
        encode_split(split, Encoder(each, Lengths(60, 20))).rows.sha256
        for each in (template, Other(template.tokenizer))
    }
    assert len(hashes) == 2


def test_overwrite_reads_and_encodes_again(file, template, monkeypatch):
    encoder = Encoder(template, Lengths(60, 20))
    first = encode_split(load(file, max_samples=20), encoder)
    before = folders()
    calls = []
    for module, name in ((splits_module, "valid_records"), (encoded_module, "_encode")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    again = encode_split(load(file, max_samples=20, overwrite=True), encoder, overwrite=True)
    assert calls == ["valid_records", "_encode"] and again.rows.sha256 == first.rows.sha256 and folders() == before


def test_several_workers_make_the_same_rows(file, template, capfd):
    encoder = Encoder(template, Lengths(60, 20))
    alone = encode_split(load(file), encoder)
    together = encode_split(load(file), encoder, workers=3, overwrite=True)
    assert together.rows.sha256 == alone.rows.sha256 and together.report == alone.report
    assert list(together.rows) == list(alone.rows)
    seen = capfd.readouterr()
    assert seen.out == seen.err == ""


def test_mixed_rows_keep_their_order(tmp_path, file, template):
    general = write(tmp_path / "general.jsonl", [{"prompt": f"q{i}", "response": "a"} for i in range(7)])
    encoder = Encoder(template, Lengths(60, 20))
    splits = [mixed(load(file, max_samples=40), [f"{general}:0.5"], seed, OPTIONS) for seed in (1, 1, 2)]
    one, again, other = (encode_split(split, encoder) for split in splits)
    assert [row.source for row in one.rows] == [record.source for record in splits[0].records]
    assert len(one.rows) == 60 and one.rows.sha256 == again.rows.sha256 != other.rows.sha256


def test_a_cache_that_can_not_be_written(tmp_path, file, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(ConfigError, match=r"file/ptuning.*: the cache of data can't be used .*HF_DATASETS_CACHE"):
        load(file)


def test_half_made_rows_are_made_again(file, template):
    encoder = Encoder(template, Lengths(60, 20))
    first = encode_split(load(file, max_samples=20), encoder)
    for folder in cache_folder().iterdir():
        (folder / ABOUT).unlink()
    assert encode_split(load(file, max_samples=20), encoder).rows.sha256 == first.rows.sha256
    assert all({path.suffix for path in folder.iterdir()} == {".arrow", ".json"} for folder in cache_folder().iterdir())


def test_of_two_runs_the_faster_ones_rows_stay(file, monkeypatch):
    def slow(*args, **kwargs):
        monkeypatch.setattr(splits_module, "valid_records", real)
        faster.append(load(file))
        return real(*args, **kwargs)

    real, faster = splits_module.valid_records, []
    monkeypatch.setattr(splits_module, "valid_records", slow)
    assert load(file) == faster[0] and len(folders()) == 1


def test_what_can_not_be_read_leaves_nothing_behind(file):
    file.write_text(file.read_text() + "\n{broken")
    for _ in range(2):
        with pytest.raises(DataError, match="1 problem in 1 of 2501 rows"):
            load(file)
    assert folders() == []


def test_the_hash_is_that_of_the_content_in_order(file, template):
    found = encode_split(load(file, max_samples=30), Encoder(template, Lengths(60, 20)))
    table = found.rows.dataset.data.table
    rows = table.to_pylist()

    def sha(rows: list[dict], size: int = 1000) -> str:
        pieces = [pa.Table.from_pylist(rows[i : i + size], schema=table.schema) for i in range(0, len(rows), size)]
        return rows_sha256(Dataset(pa.concat_tables(pieces)))

    assert sha(rows) == sha(rows, 7) == found.rows.sha256
    assert sha([*rows[1:], rows[0]]) != found.rows.sha256
    labelled = [{**rows[0], "labels": [IGNORE, *rows[0]["labels"][1:-1], IGNORE]}, *rows[1:]]
    assert sha(labelled) != found.rows.sha256
    # Where one row ends and the next begins matters too.
    joined = {**rows[0], **{name: rows[0][name] + rows[1][name] for name in ("input_ids", "labels", "length")}}
    split = {**rows[1], "input_ids": [], "labels": [], "length": 0}
    assert sha([joined, split, *rows[2:]]) != found.rows.sha256


SCRIPT = """
import sys
from ptuning.data.batch import LengthGroupedSampler, PadRight, RowDataset
from ptuning.data.encode import Encoder, Lengths
from ptuning.data.encoded import encode_split
from ptuning.data.guess import FormatOptions
from ptuning.data.splits import load_split
from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

encoder = Encoder(ChatGLM2Template(ChatGLMTokenizer(sys.argv[1])), Lengths(60, 20))

def rows(file):
    return encode_split(load_split("train", file, FormatOptions()), encoder)
"""


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_memory_does_not_grow_with_the_rows(tmp_path, template, warm_bin):
    """From the file to batches. Memory-mapped files count as RSS, not as anonymous memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    code = """
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

for file in sys.argv[2:]:
    found = RowDataset(rows(file).rows)
    order = iter(LengthGroupedSampler(found.lengths, 16, 1))
    for _ in range(100):
        PadRight(0)([found[next(order)] for _ in range(16)])
    print(len(found), anonymous())
"""
    files = []
    for count in (2000, 5000, 30_000):
        rows = [{"prompt": f"问题 {i} 好好好好", "response": f"答案 {i} 很好很好"} for i in range(count)]
        files.append(write(tmp_path / f"{count}.jsonl", rows))
    out = run(warm_bin / "python", "-c", SCRIPT + code, template.tokenizer.vocab_file, *files)
    sizes = dict(map(int, line.split()) for line in out.splitlines())
    grown = (sizes[30_000] - sizes[5000]) * 1024
    assert grown < 20e6, f"{grown / 1e6:.0f} MB"  # as Python lists these rows take 80 MB


def test_one_process_of_a_machine_encodes_for_all(tmp_path, template, monkeypatch, warm_bin, free_port):
    file = write(tmp_path / "own.jsonl", [{"prompt": f"只在这里 {i}", "response": f"答案 {i}"} for i in range(50)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    script = tmp_path / "both.py"
    script.write_text(
        SCRIPT
        + """
import torch.distributed as dist
from accelerate import PartialState
from ptuning.data import encoded, splits
from ptuning.errors import DataError

state, made = PartialState(cpu=True), []
for module, name in ((splits, "valid_records"), (encoded, "_encode")):
    real = getattr(module, name)
    setattr(module, name, lambda *a, real=real, name=name, **k: made.append(name) or real(*a, **k))
found = rows(sys.argv[2])
try:
    rows(sys.argv[3])
except DataError as error:
    refused = "1 problem in 1 of 1 rows" in str(error)
sys.stdout.write(f"{state.process_index} {sorted(set(made[:4]))} {found.rows.sha256} {refused}\\n")
dist.destroy_process_group()
""",
        encoding="utf-8",
    )
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "", "response": "b"}])
    launcher = (warm_bin / "torchrun", "--nproc_per_node=2", f"--master_port={free_port}", script)
    lines = sorted(run(*launcher, template.tokenizer.vocab_file, file, bad).splitlines())
    sha = encode_split(load(file), Encoder(template, Lengths(60, 20))).rows.sha256
    assert lines == [f"0 ['_encode', 'valid_records'] {sha} True", f"1 ['valid_records'] {sha} True"]
