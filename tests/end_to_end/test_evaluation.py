"""Evaluation by real processes: stopped and continued, divided, beside its base, and best checkpoints."""

import json
import os
import signal
import subprocess

import pytest

from ptuning.evaluation.compare import compare_command
from tests.end_to_end.conftest import BIN, MODEL, ROOT


def flags(output_dir, **more) -> list[str]:
    options = {
        "do_predict": True,
        "model_name_or_path": MODEL,
        "test_file": ROOT / "data" / "advertise" / "dev.json",
        "prompt_column": "content",
        "response_column": "summary",
        "output_dir": output_dir,
        "max_predict_samples": 13,
        "max_source_length": 64,
        "max_target_length": 24,
        "report_to": "none",
    } | more
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, nobody stops it."""
    folder = tmp_path_factory.mktemp("alone")
    command = [BIN / "python", "-m", "ptuning.main", *flags(folder, probe=True)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_two_processes_give_the_same_files(alone, tmp_path, run_main, two_processes):
    run_main(*flags(tmp_path, probe=True, use_cpu=True), launcher=two_processes)
    assert read(tmp_path / "metrics.json") == read(alone / "metrics.json")
    for name in ("predictions_base.jsonl", "probe_base.jsonl"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()


def test_an_untuned_model_has_half_a_probe(alone):
    assert len((alone / "probe_base.jsonl").read_text().splitlines()) >= 60
    assert not (alone / "probe.jsonl").exists()
    assert set(read(alone / "metrics.json")) == {"base"}
    assert (alone / "evaluation.json").is_file() and (alone / "report.html").is_file()


def test_killed_and_started_again_it_goes_on(alone, tmp_path, run_main, wait_until):
    command = [BIN / "python", "-m", "ptuning.main", *flags(tmp_path, generation_batch_tokens=200)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part = tmp_path / "predictions_base.part0.jsonl"
    wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run_main(*flags(tmp_path))
    assert "of 13 rows were answered before; going on with the others" in done.stdout
    assert (tmp_path / "predictions_base.jsonl").read_bytes() == (alone / "predictions_base.jsonl").read_bytes()


def test_base_beside_tuned_and_an_earlier_base_instead(alone, tmp_path, run_main, train_flags, capsys):
    test = {"test_file": ROOT / "data" / "advertise" / "dev.json", "max_predict_samples": 13, "max_target_length": 24}
    run = [*train_flags(tmp_path / "now", max_steps=2, **test), "--do_predict", "--probe"]
    run_main(*run, "--baseline")
    now = read(tmp_path / "now" / "metrics.json")
    assert now["base"] == read(alone / "metrics.json")["base"]
    assert now["probe"]["rows"] >= 60 and now["tuned"]["answer_loss"] < now["base"]["answer_loss"]
    compared = compare_command([str(tmp_path / "now"), "--json"])
    assert compared == 0 and json.loads(capsys.readouterr().out)["metrics"] == now["change"]
    run[run.index(str(tmp_path / "now"))] = str(tmp_path / "earlier")
    run_main(*run, "--baseline_from", alone)
    assert read(tmp_path / "earlier" / "metrics.json") == now
    for name in ("predictions_base.jsonl", "probe.jsonl", "probe_base.jsonl"):
        assert (tmp_path / "earlier" / name).read_bytes() == (tmp_path / "now" / name).read_bytes()
    data = read(tmp_path / "now" / "data.json")
    assert set(data) == {"train", "test"} and data["test"]["rows"] == 13


def test_a_base_of_other_rows_is_refused(alone, tmp_path, run_main, train_flags):
    test = {"test_file": ROOT / "data" / "advertise" / "dev.json", "max_predict_samples": 5, "max_target_length": 24}
    run = [*train_flags(tmp_path / "run", max_steps=1, **test), "--do_predict", "--baseline_from", alone]
    done = run_main(*run, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "has 13 rows and" in done.stderr and "has 5" in done.stderr


def test_the_best_checkpoint_by_a_score_is_kept(tmp_path, run_main, train_flags):
    """A learning rate that destroys the prefix after the first evaluation: the best is early."""
    dev = ROOT / "data" / "advertise" / "dev.json"
    options = {"validation_file": dev, "max_eval_samples": 8, "metric_for_best_model": "chrf", "eval_steps": 2}
    options |= {"save_total_limit": 1, "early_stopping_patience": 1, "max_steps": 40, "learning_rate": 30}
    done = run_main(*train_flags(tmp_path, **options))
    best = read(tmp_path / "best.json")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {entry["step"]: entry["eval_chrf"] for entry in log if "eval_chrf" in entry}
    assert len(scores) < 20, "it never stopped early"
    assert scores[best["step"]] == max(scores.values()) == best["value"]
    assert best["step"] < max(scores)
    kept = tmp_path / best["checkpoint"]
    assert kept.is_dir() and f"Best: {kept.name} with eval_chrf" in done.stdout
    weights = next(kept.glob("prefix-*.safetensors"))
    assert (tmp_path / weights.name).read_bytes() == weights.read_bytes()


def test_scoring_while_training_changes_nothing(tmp_path, run_main, train_flags):
    from tests.end_to_end.conftest import losses

    dev = ROOT / "data" / "advertise" / "dev.json"
    options = {"validation_file": dev, "max_eval_samples": 4, "eval_steps": 2, "max_steps": 4}
    run_main(*train_flags(tmp_path / "plain", **options))
    run_main(*train_flags(tmp_path / "scored", metric_for_best_model="bleu-4", **options))
    assert losses(tmp_path / "plain") == losses(tmp_path / "scored")


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for other processes there")
def test_ctrl_c_leaves_a_report(tmp_path, train_flags, wait_until):
    command = [BIN / "python", "-m", "ptuning.main", *train_flags(tmp_path, max_steps=5000)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until((tmp_path / "log.jsonl").exists, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in output
    assert read(tmp_path / "outcome.json")["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
