"""`ptuning validate-data`: figures, problems, notes, clean files and exit status."""

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptuning.config import DataArguments
from ptuning.errors import ConfigError, PTuningError
from ptuning.validation.command import validate_command
from ptuning.validation.survey import Histogram

MODEL = Path(__file__).parents[2] / "models" / "chatglm2-tiny"
GOOD = {"content": "类型#上衣", "summary": "一件上衣。"}


def write(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict]:
    return [{"content": f"问题 {i}", "summary": f"答案 {i}"} for i in range(start, start + count)]


@pytest.fixture
def validate(capsys):
    def run(*argv: object) -> tuple[int, str]:
        status = validate_command([str(arg) for arg in argv])
        return status, capsys.readouterr().out

    return run


def as_json(validate, *argv: object) -> tuple[int, dict]:
    status, out = validate(*argv, "--json")
    return status, json.loads(out)


def test_a_clean_file(tmp_path, validate):
    file = write(tmp_path / "train.jsonl", numbered(30))
    status, out = validate(file, "--model_name_or_path", MODEL)
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"{file}: 30 rows (columns prompt 'content', response 'summary', guessed)"
    assert lines[1] == "  turns: 1 in 30 rows"
    assert lines[2].split() == ["tokens", "median", "90%", "95%", "99%", "longest"]
    assert lines[3].startswith("  prompts ") and lines[3].endswith("; 0 cut at --max_source_length 1024")
    assert lines[4].startswith("  answers ") and lines[4].endswith("; 0 cut at --max_target_length 128")
    assert lines[5].startswith(
        "suggested: --max_source_length 32 --max_target_length 16 (cuts none of the prompts and none"
    )
    assert len(lines) == 6


def test_one_malformed_history_fails(tmp_path, validate):
    rows = [{**row, "history": [["早", "早！"]]} for row in numbered(50)]
    rows[20]["history"] = {"早": "早！"}
    file = write(tmp_path / "train.jsonl", rows)
    status, out = validate(file)
    assert status == 1
    assert out.startswith(
        f"{file}:21: history: is an object with the keys '早', not a list of [question, answer] pairs"
    )
    assert "turns: 2 in 49 rows" in out


def test_each_problem_is_a_line_and_the_status_is_1(tmp_path, validate):
    file = write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "summary": ""}, "{broken", "[1]", {"content": "a"}])
    status, out = validate(file)
    assert status == 1
    assert out.splitlines() == [
        f"{file}:2: summary: is empty: write a text or delete the row",
        f"{file}:3: JSON: Expecting property name enclosed in double quotes at column 2, near '{{broken': correct the JSON there",
        f'{file}:4: row: is a list of 1, not an object: write the row as {{"column": "text", …}}',
        f"{file}:5: summary: this row has no such column, it has 'content': add it or delete the row",
        f"{file}: 5 rows, 4 problems in 4 rows (columns prompt 'content', response 'summary', guessed)",
        "  turns: 1 in 1 row",
        "note: no token lengths; for them give --model_name_or_path",
    ]


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path, validate):
    train = write(tmp_path / "train.jsonl", [{**GOOD, "summary": ""}, GOOD])
    gbk = tmp_path / "gbk.json"
    gbk.write_bytes(json.dumps([GOOD], ensure_ascii=False).encode("gbk"))
    status, out = validate(tmp_path / "trian.jsonl", gbk, train)
    assert status == 1
    assert f"{tmp_path}/trian.jsonl: no such file in {tmp_path}: did you mean " in out
    assert f"{gbk}: the encoding is GBK (a guess" in out
    assert f"{train}:1: summary: is empty" in out and f"{train}: 2 rows, 1 problem in 1 row" in out


def test_a_file_that_breaks_off_has_the_figures_of_what_stands_before(tmp_path, validate):
    file = tmp_path / "train.json"
    file.write_text("[" + ",\n".join(json.dumps(row) for row in numbered(5)) + ",\n{oops", encoding="utf-8")
    status, out = validate(file)
    assert status == 1
    assert out.splitlines()[0].startswith(f"{file}:6: JSON: ")
    assert out.splitlines()[1].startswith(f"{file}: 5 rows (columns")
    assert out.splitlines()[2] == "  the figures are those of the rows before the fault"


def test_an_empty_list(tmp_path, validate):
    file = write(tmp_path / "a.json", ["[]"])
    status, out = validate(file)
    assert status == 1 and out.startswith(f"{file}: has 0 rows, at least 1 is needed: write rows into it\n")


def test_what_is_cut_and_what_is_suggested(tmp_path, validate):
    rows = [*numbered(98), {"content": "长" * 400, "summary": "好"}, {"content": "问", "summary": "好" * 300}]
    file = write(tmp_path / "train.jsonl", rows)
    status, found = as_json(validate, file, "--model_name_or_path", MODEL, "--max_source_length", 64)
    prompts, answers = found["files"][0]["prompt_tokens"], found["files"][0]["answer_tokens"]
    assert status == 0
    assert prompts["limit"] == 64 and prompts["cut"] == 1 and prompts["longest_line"] == 99 and prompts["longest"] > 400
    assert (
        answers["limit"] == DataArguments.max_target_length and answers["cut"] == 1 and answers["longest_line"] == 100
    )
    assert found["suggested"] == {
        "max_source_length": 32,
        "max_target_length": 16,
        "rows": 100,
        "cut_prompts": 1,
        "cut_answers": 1,
    }
    assert "(cuts 1.0% of the prompts and 1.0% of the answers)" in validate(file, "--model_name_or_path", MODEL)[1]


def test_percentiles():
    histogram = Histogram()
    for length in range(1, 201):
        histogram.add(length, line=1000 + length)
    assert [histogram.percentile(p) for p in (50, 90, 99, 100)] == [100, 180, 198, 200]
    assert (histogram.longest, histogram.longest_line, histogram.above(150)) == (200, 1200, 50)
    assert histogram.suggested() == 208
    histogram.add(5000, line=1)
    assert histogram.suggested() == 208, "one long row doesn't raise the limit of all"
    assert Histogram().percentile(50) == 0


def test_turns_and_system_texts(tmp_path, validate):
    turn = [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]
    rows = [{"conversations": turn}, {"conversations": turn * 3}, {"conversations": turn, "system": "短"}]
    _, out = validate(write(tmp_path / "a.jsonl", rows))
    assert "(ShareGPT conversations, guessed)\n  turns: 1 in 2 rows, 3 in 1 row; a system text in 1 row\n" in out


def test_repeated_rows_and_rows_of_both_files(tmp_path, validate):
    train = write(tmp_path / "train.jsonl", [*numbered(10), numbered(1)[0], {**numbered(1)[0], "summary": "别的"}])
    dev = write(tmp_path / "dev.jsonl", [*numbered(2, 20), *numbered(3, 4), {"content": "问题 9", "summary": "另一个"}])
    status, out = validate(train, dev)
    assert status == 0
    assert "  note: 1 row repeats an earlier row: line 11 = line 1\n" in out
    assert (
        f"note: 4 of 6 questions of {dev} also stand in {train}, 3 with the same answer: {dev}:3 = {train}:5, "
        f"{dev}:4 = {train}:6, {dev}:5 = {train}:7, {dev}:6 = {train}:10; scores on them measure memory"
    ) in out
    found = as_json(validate, train, dev)[1]
    assert found["overlaps"] == [
        {"first": train, "second": dev, "rows": 3, "questions": 4, "lines": [[5, 3], [6, 4], [7, 5], [10, 6]]}
    ]
    assert found["files"][0]["repeated_rows"] == 1 and found["files"][0]["repeated"] == [[11, 1]]


def test_odd_rows_are_noted_and_do_not_fail(tmp_path, validate):
    odd = [
        {"content": "你好", "summary": " 你好"},
        {"content": "[gMASK]", "summary": "a"},
        {"content": "a", "summary": "好</s>"},
        {"content": "b", "summary": "锟斤拷"},
        {"content": "c<br/>", "summary": "x &nbsp; y"},
        {"content": "1 < 2 & 3 > 2", "summary": "是"},
    ]
    status, out = validate(
        write(tmp_path / "a.jsonl", [*odd, *[{"content": f"第{i}个", "summary": "不知道"} for i in range(12)]])
    )
    assert status == 0
    notes = [line for line in out.splitlines() if line.startswith("  note: ")]
    assert notes[0] == "  note: 1 row: the answer is the question again: lines 1"
    assert notes[1].startswith("  note: 2 rows: control tokens or the template's own words") and notes[1].endswith(
        "lines 2, 3"
    )
    assert notes[2].startswith("  note: 1 row: damaged characters") and notes[2].endswith("lines 4")
    assert notes[3] == "  note: 1 row: HTML tags or entities: lines 5"
    assert notes[4:] == ["  note: 12 rows have the same answer, the first at line 7"]


def test_very_long_rows_are_noted(tmp_path, validate):
    file = write(tmp_path / "a.jsonl", [GOOD, {"content": "问", "summary": "龘" * 9000}])
    _, found = as_json(validate, file, "--model_name_or_path", MODEL)
    assert found["files"][0]["odd"]["very_long"] == {"rows": 1, "lines": [2]}


def test_fix_writes_clean_rows_as_they_are_and_the_reasons_for_the_others(tmp_path, validate):
    extra = {"id": 7, "content": "问", "summary": "答"}
    train = write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "summary": ""}, "{broken", extra, GOOD])
    before = Path(train).read_bytes()
    status, out = validate(train, "--fix", tmp_path / "clean.jsonl")
    assert status == 1 and Path(train).read_bytes() == before
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == [GOOD, extra]
    dropped = [json.loads(line) for line in (tmp_path / "clean.dropped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in dropped] == [(train, 2), (train, 3), (train, 5)]
    assert dropped[0]["reasons"] == ["summary: is empty: write a text or delete the row"]
    assert dropped[2]["reasons"] == ["the same as line 1"]
    assert (
        f"Wrote {tmp_path}/clean.jsonl: 2 rows\nWrote {tmp_path}/clean.dropped.jsonl: 3 rows that were left out\n"
        in out
    )
    assert validate(tmp_path / "clean.jsonl")[0] == 0
    assert not list(tmp_path.glob("*.part"))


def test_fix_of_several_files_and_formats_goes_into_a_folder(tmp_path, validate):
    train = tmp_path / "train.csv"
    train.write_text('query,response,history\na,b,"[[""c"", ""d""]]"\n,x,\n', encoding="utf-8")
    broken = tmp_path / "dev.json"
    broken.write_text('[{"query": "e", "response": "f\\ud83d\\ude00"},\n{"query"', encoding="utf-8")
    out = tmp_path / "clean"
    status, _ = validate(train, broken, tmp_path / "nowhere.json", "--fix", out)
    assert status == 1
    assert json.loads((out / "train.jsonl").read_text()) == {"query": "a", "response": "b", "history": [["c", "d"]]}
    assert json.loads((out / "dev.jsonl").read_text()) == {"query": "e", "response": "f😀"}
    assert sorted(path.name for path in out.iterdir()) == ["dev.jsonl", "dropped.jsonl", "train.jsonl"]
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [row["line"] for row in dropped] == [3, None, None]
    assert dropped[1]["reasons"][0].endswith("(from there on nothing was read)")


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("train.jsonl", "train.jsonl exists, and nothing is overwritten; name another place or delete it"),
        (".", "train.jsonl exists, and nothing is overwritten"),
        ("clean.csv", "clean rows are written as JSON lines; end the name in .jsonl, or name a folder"),
    ],
)
def test_fix_overwrites_nothing(tmp_path, monkeypatch, validate, out, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(ConfigError) as caught:
        validate("train.jsonl", "--fix", out)
    assert problem in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_fix_needs_a_folder_for_several_files_of_different_names(tmp_path, validate):
    with pytest.raises(ConfigError, match="there are 2 input files; name a folder instead of a file"):
        validate("a.json", "b.json", "--fix", tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="would be written twice; check files of equal names one at a time"):
        validate("x/a.json", "y/a.csv", "--fix", tmp_path / "x")


def test_json_has_the_problems_and_no_other_text(tmp_path, validate):
    file = write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "summary": 5}])
    status, found = as_json(validate, file)
    assert status == 1 and found["ok"] is False and found["suggested"] is None
    (survey,) = found["files"]
    assert (survey["rows"], survey["bad_rows"], survey["problem_count"], survey["guessed"]) == (2, 1, 1, True)
    assert survey["problems"] == [
        {
            "line": 2,
            "field": "summary",
            "problem": "is the number 5, not text",
            "fix": 'put it in double quotes: "5"',
        }
    ]
    status, found = as_json(validate, tmp_path / "nowhere.json")
    assert status == 1 and "no such file" in found["files"][0]["failure"]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["a.json", "a.json"], "a.json is given 2 times; give each file once"),
        (["a.json", "--data_format", "openai", "--prompt_column", "q"], "leave one of the two out"),
        (["a.json", "--model_name_or_path", "/no/such/model"], "/no/such/model"),
        (
            ["a.json", "--model_name_or_path", str(MODEL), "--max_source_length", "3"],
            "max_source_length 3 is shorter than",
        ),
    ],
)
def test_misuse(argv, problem):
    with pytest.raises(PTuningError) as caught:
        validate_command(argv)
    assert problem in str(caught.value)


def test_memory_does_not_grow_with_the_file(tmp_path, warm_bin):
    """30,000 rows of 2 KB, 54 MB of text, in each kind of file; the process has read a small one before."""
    text = "衣" * 600
    files = [tmp_path / f"big.{kind}" for kind in ("jsonl", "json", "csv")]
    lines, array, table = (path.open("w", encoding="utf-8") for path in files)
    with lines, array, table:
        array.write("[\n")
        table.write("prompt,response\n")
        for i in range(30_000):
            row = json.dumps({"prompt": f"问{i}", "response": text + str(i)}, ensure_ascii=False)
            lines.write(f"{row}\n")
            array.write(f"{row},\n" if i < 29_999 else f"{row}\n]")
            table.write(f"问{i},{text}{i}\n")
    small = write(tmp_path / "small.jsonl", numbered(2000))
    code = """
import resource, sys
from ptuning.validation.command import validate_command
for file in sys.argv[1:]:
    assert validate_command([file]) == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    command = [warm_bin / "python", "-c", code, small, *files]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    unit = 1 if sys.platform == "darwin" else 1024
    first, *peaks = (int(line.split()[1]) * unit for line in done.stdout.splitlines() if line.startswith("peak"))
    assert len(peaks) == 3 and min(path.stat().st_size for path in files) > 50e6
    assert max(peaks) - first < 20e6, f"{(max(peaks) - first) / 1e6:.0f} MB"


def test_files_without_lines_are_spoken_of_by_row(tmp_path, validate):
    rows = [*numbered(3), {"content": "问题 0", "summary": "答案 0"}]
    for row in rows:
        row["day"] = datetime.date(2024, 5, 1)
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    status, out = validate(file, "--fix", tmp_path / "clean", "--model_name_or_path", MODEL)
    assert status == 0 and "note: 1 row repeats an earlier row: row 4 = row 1" in out
    assert "(row 1)" in out and "(line " not in out
    clean = [json.loads(line) for line in (tmp_path / "clean" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert clean[0] == {"content": "问题 0", "summary": "答案 0", "day": "2024-05-01"} and len(clean) == 3
    dropped = json.loads((tmp_path / "clean" / "dropped.jsonl").read_text(encoding="utf-8"))
    assert dropped["reasons"] == ["the same as row 1"]


def test_packed_files_keep_their_names(tmp_path, validate):
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in numbered(3))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    status, out = validate(tmp_path / "train.jsonl.gz", "--fix", tmp_path / "clean")
    assert status == 0 and f"Wrote {tmp_path}/clean/train.jsonl: 3 rows" in out
    with pytest.raises(ConfigError, match=r"clean rows are written as JSON lines"):
        validate(tmp_path / "train.jsonl.gz", "--fix", tmp_path / "x.jsonl.gz")
