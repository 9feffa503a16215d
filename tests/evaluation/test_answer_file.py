"""`ptuning predict`."""

import json

import pytest

from ptuning.data.formats import FORMATS, Columns
from ptuning.data.guess import FormatOptions, find_format
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation import answer_file
from ptuning.evaluation.answer_file import PredictOptions, predict_command
from tests.end_to_end.conftest import MODEL


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("你好", "你是谁", "再见", "谢谢")))
    return file


def predict(file, output, *more):
    options = [
        "--model_name_or_path",
        str(MODEL),
        "--file",
        str(file),
        "--output",
        str(output),
        "--max_new_tokens",
        "6",
    ]
    predict_command([*options, *more])
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_lines_hold_question_and_answer_in_order(questions, tmp_path, capsys):
    lines = predict(questions, tmp_path / "a" / "out.jsonl")
    assert [line["index"] for line in lines] == [0, 1, 2, 3] and lines[0]["prompt"] == "你好"
    assert set(lines[0]) == {"index", "prompt", "predict", "tokens", "finished"}
    assert all(0 < line["tokens"] <= 6 for line in lines)
    assert "Wrote 4 answers to" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.jsonl"]


def test_a_stopped_run_goes_on(questions, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    expected = predict(questions, whole)
    real, made = answer_file._line, []

    def stop_at_third(record, answer):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(answer.index)
        return real(record, answer)

    monkeypatch.setattr(answer_file, "_line", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        predict(questions, output)
    assert not output.exists()
    monkeypatch.setattr(answer_file, "_line", real)
    assert predict(questions, output) == expected
    assert "2 of 4 rows were answered before" in capsys.readouterr().out


def test_an_output_that_is_there_is_kept(questions, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(ConfigError, match=r"out\.jsonl is there already; give another name, or --overwrite"):
        predict(questions, output)
    assert output.read_text() == "precious"
    assert len(predict(questions, output, "--overwrite")) == 4
    with pytest.raises(ConfigError, match=r"is a folder; give a file name, e\.g\. .*answers\.jsonl"):
        predict(questions, tmp_path)


def test_ranges_are_held():
    with pytest.raises(ConfigError, match="--num_beams is 0; use at least 1"):
        PredictOptions("a", "b", num_beams=0)


USER, ASSISTANT = {"role": "user", "content": "甲"}, {"role": "assistant", "content": "旧"}
THREE = [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二"}, {"from": "human", "value": "甲"}]


@pytest.mark.parametrize(
    ("row", "prompt", "history"),
    [
        ({"content": "甲", "other": 1}, "甲", ()),
        ({"instruction": "甲", "input": "乙"}, "甲\n乙", ()),
        ({"messages": [USER]}, "甲", ()),
        ({"conversations": THREE}, "甲", (("一", "二"),)),
        ({"messages": [USER, ASSISTANT]}, "甲", ()),  # an answer that is there is not used
    ],
)
def test_every_format_without_answers(row, prompt, history, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    record = find_format(file, FormatOptions(references=False)).shape.read(row, "x")
    assert (record.prompt, record.history, record.response) == (prompt, history, None)


def test_training_still_needs_answers(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "甲"}')
    with pytest.raises(
        DataError, match=r"no known response column.*to answer rows that have no answers yet: ptuning predict"
    ):
        find_format(file, FormatOptions(prompt="question"))
    assert "the user's" in FORMATS["openai"].read({"messages": [USER]}, "x")[0][1].problem
    file.write_text('{"zzz": "甲"}')
    with pytest.raises(DataError, match="name it with --prompt_column"):
        find_format(file, FormatOptions(references=False))
    assert find_format(file, FormatOptions(prompt="zzz", references=False)).shape == Columns("zzz", None)
