"""One folder, one run: what a second command may do there, and what is left when a run is stopped."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ptuning.report import report_command
from tests.end_to_end.conftest import BIN, ROOT, wait_for_end


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path, tmp_path_factory, run_main, train_flags) -> Path:
    """A run of two steps that has ended; each test has its own copy."""
    original = tmp_path_factory.getbasetemp() / "finished-run"
    if not (original / "ptuning_config.json").exists():
        run_main(*train_flags(original, max_steps=2))
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_resuming_a_finished_run_does_nothing(finished, run_main, train_flags):
    before = contents(finished)
    again = run_main(*train_flags(finished, max_steps=2), "--resume_from_checkpoint", "true")
    assert "checkpoint-2 is the end of a finished run; nothing is left to do" in again.stdout
    assert contents(finished) == before


def test_a_run_may_get_longer_but_no_other_run(finished, run_main, train_flags):
    longer = train_flags(finished, max_steps=3, learning_rate=1e-3, max_train_samples=32)
    refused = run_main(*longer, "--resume_from_checkpoint", "true", check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    for words in (
        "learning_rate was 0.02, now 0.001",
        "max_train_samples was None, now 32",
        "training data has changed",
    ):
        assert words in refused.stderr
    assert f"--ptuning_checkpoint {finished}/checkpoint-2" in refused.stderr
    longer = run_main(*train_flags(finished, max_steps=3), "--resume_from_checkpoint", "true")
    assert "note: max_steps goes from 2 to 3" in longer.stdout and (finished / "run-resumed-2.json").is_file()


def test_a_new_run_leaves_no_scores_of_the_old_one(finished, run_main, train_flags):
    for name in ("metrics.json", "predictions.jsonl", "probe.jsonl", "notes.txt"):
        (finished / name).write_text("{}\n")
    run_main(*train_flags(finished, max_steps=1), "--overwrite_output_dir")
    left = {path.name for path in finished.iterdir()}
    assert "notes.txt" in left
    assert not left & {
        "metrics.json",
        "predictions.jsonl",
        "probe.jsonl",
        "run-resumed-2.json",
        "checkpoint-2",
        "run.lock",
    }


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM for other processes there")
def test_sigterm_leaves_a_report_and_a_second_run_is_refused(tmp_path, run_main, train_flags, wait_until):
    flags = train_flags(tmp_path, max_steps=5000)
    command = [BIN / "python", "-m", "ptuning.main", *flags]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "log.jsonl"
    wait_until(log.exists, process)
    pid = read(tmp_path / "run.lock")["pid"]
    second = run_main(*flags, "--overwrite_output_dir", check=False)
    assert second.returncode == 2 and f"a run is at work there: process {pid} on" in second.stderr
    assert process.poll() is None and log.exists()
    os.kill(pid, signal.SIGTERM)  # as the message says
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in output
    assert read(tmp_path / "outcome.json")["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_a_launcher_that_stops_its_processes(tmp_path, train_flags, two_processes, wait_until):
    """Also where one process has died and the launcher ends the others."""
    command = [*map(str, two_processes), str(ROOT / "ptuning" / "main.py"), *train_flags(tmp_path, max_steps=5000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until((tmp_path / "log.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    outcome = read(tmp_path / "outcome.json")
    assert (outcome["status"], outcome["error"]) == ("interrupted", "the launcher sent SIGTERM")
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "run.lock").exists()


def test_the_report_of_a_run_that_goes_on_and_is_killed(tmp_path, train_flags, wait_until):
    flags = train_flags(tmp_path, max_steps=100_000, logging_steps=1, save_strategy="no")
    command = [BIN / "python", "-m", "ptuning.main", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PTUNING_LANG": "zh"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    page = tmp_path / "report.html"
    wait_until(page.exists, process)
    assert "运行中，本页最后写于" in page.read_text(encoding="utf-8") and 'http-equiv="refresh"' in page.read_text()
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    wait_for_end(tmp_path)
    assert "训练 " in said and "有效批量 " in said
    assert '"step": 1' in (tmp_path / "log.jsonl").read_text()
    assert report_command([str(tmp_path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "No end of this run is recorded: it was killed" in text and "refresh" not in text
