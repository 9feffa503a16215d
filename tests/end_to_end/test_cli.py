"""The installed command and the steps after training: evaluate, chat, export."""

import json
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptuning import load_model
from tests.end_to_end.conftest import BIN, MODEL, ROOT

DEV = ROOT / "data" / "advertise" / "dev.json"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, rows_file):
    """A run of `ptuning train`."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    flags = f"--model_name_or_path {MODEL} --train_file {rows_file} --prompt_column content --response_column summary "
    flags += f"--output_dir {folder} --pre_seq_len 8 --max_steps 2 --max_source_length 96 --max_target_length 24"
    done = ptuning("train", *flags.split())
    assert "Saved the tuned prefix" in done.stdout
    assert f"ptuning chat --ptuning_checkpoint {folder}" in done.stdout
    return folder


def ptuning(*args, check=True, **kwargs):
    command = [str(BIN / "ptuning"), *map(str, args)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600, cwd="/", **kwargs)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_run_folder_says_how_it_was_made(tuned):
    run = json.loads((tuned / "run.json").read_text())
    assert run["config"]["seed"] == 42 and run["config"]["pre_seq_len"] == 8
    assert len(run["data_sha256"]["train"]) == 64
    assert run["versions"]["torch"].startswith("2.")
    assert (tuned / "loss_curve.png").is_file()
    assert list((tuned / "runs").rglob("events.out.tfevents.*")) or list(tuned.rglob("events.out.tfevents.*"))


def test_evaluate_infers_everything_from_the_checkpoint(tuned, tmp_path):
    flags = f"--test_file {DEV} --prompt_column content --response_column summary --max_predict_samples 6 --baseline"
    done = ptuning("evaluate", "--ptuning_checkpoint", tuned, *flags.split(), "--output_dir", tmp_path / "eval")
    assert "BLEU-4" in done.stdout and "base" in done.stdout and "tuned" in done.stdout
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    assert all(line["tokens"] <= 24 for line in lines)  # max_target_length of the training run
    bleu = sum(line["scores"]["bleu-4"] for line in lines) / 6
    assert metrics["tuned"]["bleu-4"] == pytest.approx(bleu, abs=1e-3)
    assert len((tmp_path / "eval" / "predictions_base.jsonl").read_text().splitlines()) == 6


def test_evaluate_takes_a_run_alone(rows_file, tmp_path):
    """The test rows, columns and lengths are the run's; the scores go beside it."""
    config = tmp_path / "run.yaml"
    folder = tmp_path / "my run"
    options = {"model_name_or_path": MODEL, "train_file": rows_file, "validation_file": rows_file, "output_dir": folder}
    options |= {"prompt_column": "content", "response_column": "summary", "pre_seq_len": 8, "max_steps": 1}
    options |= {"max_source_length": 96, "max_target_length": 16}
    config.write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
    ptuning("train", config, "--max_train_samples", 4, "--max_eval_samples", 4)
    done = ptuning("evaluate", folder, "--max_predict_samples", 4)
    assert "tuned" in done.stdout and "BLEU-4" in done.stdout
    assert len((tmp_path / "my run-eval" / "predictions.jsonl").read_text().splitlines()) == 4


def test_predict_needs_no_answers_and_gives_those_of_evaluate(tuned, tmp_path):
    flags = f"--test_file {DEV} --prompt_column content --response_column summary --max_predict_samples 4"
    ptuning("evaluate", "--ptuning_checkpoint", tuned, *flags.split(), "--output_dir", tmp_path / "eval")
    scored = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"content": line["prompt"]}) + "\n" for line in scored))
    ptuning("predict", "--file", questions, "--output", tmp_path / "answers.jsonl", "--ptuning_checkpoint", tuned)
    answers = [json.loads(line)["predict"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers == [line["predict"] for line in scored] and all(answers)


def test_batched_answers_equal_one_by_one(tuned, tmp_path):
    flags = f"--test_file {DEV} --prompt_column content --response_column summary --max_predict_samples 7"
    answers = {}
    for size in (1, 7):
        folder = tmp_path / str(size)
        options = ["--output_dir", folder, "--per_device_eval_batch_size", size]
        ptuning("evaluate", "--ptuning_checkpoint", tuned, *flags.split(), *options)
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        answers[size] = [json.loads(line)["predict"] for line in lines]
    assert answers[1] == answers[7]


def test_official_mode_samples_with_a_seed(tuned, tmp_path):
    flags = f"--test_file {DEV} --prompt_column content --response_column summary --max_predict_samples 3"
    texts = []
    for name in ("a", "b"):
        options = ["--generation_mode", "official", "--output_dir", tmp_path / name]
        ptuning("evaluate", "--ptuning_checkpoint", tuned, *flags.split(), *options)
        texts.append((tmp_path / name / "predictions.jsonl").read_text())
    assert texts[0] == texts[1]


def test_chat(tuned):
    done = ptuning("chat", "--ptuning_checkpoint", tuned, "--max_new_tokens", "5", input="你好\n/clear\n你好\n/exit\n")
    answers = [line.split("答：")[1] for line in done.stdout.splitlines() if "答：" in line]
    assert len(answers) == 2 and answers[0] == answers[1]  # greedy, and /clear forgot the first turn


def test_export_official_and_peft_compute_the_same(tuned, tmp_path):
    for kind in ("official", "peft"):
        ptuning("export", "--ptuning_checkpoint", tuned, "--format", kind, "--output_dir", tmp_path / kind)
    ids = torch.arange(10, 40).view(1, -1)
    with torch.no_grad():
        expected = load_model(MODEL, tuned)[0](ids).logits
        official = load_model(MODEL, tmp_path / "official")[0](ids).logits
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        peft = PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits
    assert torch.equal(expected, official)
    assert torch.allclose(expected, peft, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["chat"], "give --model_name_or_path, --ptuning_checkpoint, or both"),
        (["evaluate", "--ptuning_checkpoint", "/no/such"], "/no/such"),
        (["export", "--ptuning_checkpoint", str(MODEL), "--format", "peft", "--output_dir", "/x"], "base model"),
    ],
)
def test_errors_are_one_message(args, text):
    done = ptuning(*args, check=False)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
