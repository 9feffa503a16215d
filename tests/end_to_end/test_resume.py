"""A run killed with SIGKILL and resumed is the run that was never killed."""

import os
import shutil
import signal
import subprocess

import pytest
import torch

from ptuning.methods.prefix.read import read_prefix
from tests.end_to_end.conftest import BIN, ROOT, losses, wait_for_end


def kill_after_checkpoint(command, checkpoint, environment):
    """Starts the command and kills it the moment the checkpoint is there. Returns whether it was still running, when it is gone."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in process.stdout:  # ends with the process; a line is printed for every step
        if checkpoint.is_dir():
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=300)
    killed = process.returncode == -signal.SIGKILL
    if killed:
        wait_for_end(checkpoint.parent)
    return killed


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path, run_main, train_flags):
    flags = {
        "max_steps": 24,  # one and a half epochs of 16 steps, so that a resume falls into the second one
        "save_steps": 3,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "group_by_length",
        "lr_scheduler_type": "cosine",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_main(*train_flags(whole, **flags))

    command = [BIN / "python", str(ROOT / "ptuning" / "main.py"), *train_flags(killed, **flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert kill_after_checkpoint(command, killed / "checkpoint-18", environment)
    kept = sorted(killed.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for late in kept:  # always resume from the same place, however far the run got before the kill
        if int(late.name.split("-")[1]) > 18:
            shutil.rmtree(late)
    run_main(*train_flags(killed, **flags), "--resume_from_checkpoint", "true")

    assert losses(killed) == losses(whole)
    tuned, expected = read_prefix(killed).tensors, read_prefix(whole).tensors
    assert all(torch.equal(tuned[name], expected[name]) for name in expected)
    assert (killed / "run-resumed-18.json").is_file()


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path, run_main, train_flags):
    run_main(*train_flags(tmp_path / "run", max_steps=2))
    again = run_main(*train_flags(tmp_path / "run", max_steps=2), check=False)
    assert again.returncode == 2
    for way_out in ("--resume_from_checkpoint true", "--overwrite_output_dir", "--output_dir"):
        assert way_out in again.stderr
    assert "Traceback" not in again.stderr

    changed = run_main(
        *train_flags(tmp_path / "run", max_steps=4, seed=7), "--resume_from_checkpoint", "true", check=False
    )
    assert changed.returncode == 2
    assert "seed was 42, now 7" in changed.stderr
    assert "--ptuning_checkpoint" in changed.stderr


def test_new_run_from_an_existing_prefix(tmp_path, run_main, train_flags):
    run_main(*train_flags(tmp_path / "first", max_steps=4))
    flags = train_flags(tmp_path / "second", max_steps=1, ptuning_checkpoint=tmp_path / "first")
    second = run_main(*flags)
    assert "Starting a new run from the prefix in" in second.stdout
    last, first = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert first[1] < last[1]  # begins lower than a random prefix did
    wrong = run_main(
        *train_flags(tmp_path / "third", ptuning_checkpoint=tmp_path / "first", pre_seq_len=9), check=False
    )
    assert wrong.returncode == 2
    assert "9" in wrong.stderr and "8" in wrong.stderr
    assert "Traceback" not in wrong.stderr
