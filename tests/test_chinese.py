"""What the commands of a day print is Chinese where that is asked for: a new line without its translation fails here."""

import json
import re

import pytest

from ptuning.cli import main
from tests.conftest import REPO

MODEL = REPO / "models" / "chatglm2-tiny"
# The trainer's own log, names of files, and the second of the commands to go on with.
WITHOUT_WORDS = re.compile(r"\{'.*\}|[AB]: \S+| +\S+/ptuning serve .+|")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.json with a repeated row, an odd one, and one that is too long for the lengths below; dev.json shares one with it."""
    folder = tmp_path_factory.mktemp("data")
    rows = (REPO / "data" / "advertise" / "train.json").read_text(encoding="utf-8").splitlines()[:32]
    odd = json.dumps({"content": "类型#裤" * 40, "summary": "<b>好</b>" * 30}, ensure_ascii=False)
    (folder / "train.json").write_text("\n".join([*rows[:24], rows[0], odd]) + "\n", encoding="utf-8")
    (folder / "dev.json").write_text("\n".join(rows[23:]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command; returns its lines."""
    monkeypatch.setenv("PTUNING_LANG", "zh")

    def command(*argv: object) -> list[str]:
        assert main([str(arg) for arg in argv]) == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()
        unspoken = [line for line in lines if not re.search("[\u4e00-\u9fff]", line)]
        assert [line for line in unspoken if not WITHOUT_WORDS.fullmatch(line)] == []
        assert len(lines) > len(unspoken)
        return lines

    return command


def test_a_day_in_chinese(tmp_path, data, run):
    files = ["--train_file", data / "train.json", "--validation_file", data / "dev.json", "--report_to", "none"]
    flags = ["--model_name_or_path", MODEL, *files, "--pre_seq_len", 4, "--save_steps", 1, "--logging_steps", 1]
    flags += ["--max_source_length", 64, "--max_target_length", 32, "--max_predict_samples", 3]
    flags += ["--mix", f"{data / 'dev.json'}:0.1", "--output_dir", tmp_path / "run", "--use_fast_tokenizer", "false"]
    said = run("train", *flags, "--max_steps", 1, "--do_predict", "--load_best_model_at_end", "true")
    assert "注意：--use_fast_tokenizer 在这里不起作用：基座只有一个 tokenizer" in said
    assert any("长度 4 的 prefix" in line for line in said) and "接下来：" in said[-3]
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["method"] == "prefix of 4", "a file that programs read"
    summary = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))["train"]
    assert summary["format"].endswith(", guessed") and " of 9 rows of " in summary["mixed_in"][0]

    resume = ["--resume_from_checkpoint", "true", "--load_best_model_at_end", "true", "--max_steps", 2]
    said = run("train", *flags, *resume)
    assert any(line.startswith("注意：max_steps 从 1 变为 2") for line in said)
    assert run("train", *flags, *resume)[-1].endswith("已是训练的终点，没有剩下的步数")

    evaluated = run("evaluate", tmp_path / "run", "--max_predict_samples", 3, "--baseline", "--report_to", "none")
    assert any(line.startswith("已写入 ") for line in evaluated)
    assert any("条数太少" in line for line in run("compare", f"{tmp_path / 'run'}-eval"))
    answers = ["--file", data / "dev.json", "--output", tmp_path / "answers.jsonl", "--max_predict_samples", 2]
    run("predict", "--ptuning_checkpoint", tmp_path / "run", *answers)
    run("report", tmp_path / "run")


def test_checking_data_in_chinese(tmp_path, data, run):
    files = [data / "train.json", data / "dev.json"]
    said = "\n".join(run("validate-data", *files, "--model_name_or_path", MODEL, "--fix", tmp_path / "clean"))
    for text in (
        "  注意：1 条与前面的一条相同：第 25 行 = 第 1 行",
        "HTML 标签或实体：第 26 行",
        "9 个问题中有 1 个也在",
    ):
        assert text in said
    assert "建议：--max_source_length " in said and "未收入的 1 条" in said
    assert run("validate-data", data / "dev.json")[-1].startswith("注意：没有统计 token 长度")
    dropped = (tmp_path / "clean" / "dropped.jsonl").read_text(encoding="utf-8")
    assert json.loads(dropped)["reasons"] == ["the same as line 1"], "a file that programs read"


def test_memory_in_chinese(run):
    for method in ("prefix", "lora", "full"):
        run("estimate", "--model_name_or_path", MODEL, "--method", method)


def test_a_talk_in_chinese(run, monkeypatch):
    lines = iter(["/prefix", "长" * 9000, "/clear", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    said = run("chat", "--model_name_or_path", MODEL)
    assert said[0].startswith("/clear 忘掉对话") and said[1].startswith(f"由 {MODEL.name} 回答；可用：")
    assert said[2].startswith("错误：") and "the model's context is 2048" in said[2], "errors are English"
