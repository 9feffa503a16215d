"""A full-parameter run under ZeRO-3, killed and resumed, on the same and on another number of processes."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from ptuning import cli
from tests.end_to_end.conftest import BIN, ROOT, full_flags, losses
from tests.end_to_end.test_full import weights

ZERO3 = ROOT / "configs" / "zero3.json"
RUN = {"deepspeed": ZERO3, "max_steps": 8, "save_steps": 3, "lr_scheduler_type": "cosine", "max_train_samples": 20}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of two processes: 8 steps of 4 rows, so that the second epoch begins at step 6. Its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", ROOT / "ptuning" / "main.py"]
    subprocess.run(
        [*map(str, command), *full_flags(folder, train_sampling_strategy="random", **RUN)],
        check=True,
        capture_output=True,
        timeout=600,
        env=environment(),
    )
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def only_checkpoint(folder, step: int) -> None:
    for path in folder.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


@pytest.mark.slow
def test_sigkill_of_one_process_then_resume(tmp_path, run_main, two_processes, whole):
    flags = full_flags(tmp_path / "run", train_sampling_strategy="random", **RUN | {"max_steps": 8})
    command = [*map(str, two_processes), str(ROOT / "ptuning" / "main.py"), *flags]
    process = subprocess.Popen(
        command, env=environment() | {"SAY_PID": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output, victim, killed = [], None, 0.0
    for line in process.stdout:
        output.append(line)
        if found := re.search(r"process 1 of 2 has pid (\d+)", line):
            victim = int(found[1])
        if not killed and victim and (tmp_path / "run" / "checkpoint-3").is_dir():
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
    assert process.wait(timeout=300) != 0 and killed
    assert time.monotonic() - killed < 60
    text = "".join(output)
    assert "process 0 of 2 stops: another process of this run has died" in text
    assert "--resume_from_checkpoint true" in text

    only_checkpoint(tmp_path / "run", 3)
    run_main(*flags, "--resume_from_checkpoint", "true", launcher=two_processes)
    assert losses(tmp_path / "run") == losses(whole)
    tuned, expected = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(tuned[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_resume_on_another_number_of_processes(tmp_path, run_main, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    only_checkpoint(tmp_path / "run", 3)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    one = RUN | {"per_device_train_batch_size": 4, "train_sampling_strategy": "random", "resume_from_checkpoint": True}
    refused = run_main(*full_flags(tmp_path / "run", **one), check=False)
    assert refused.returncode == 2
    assert "the number of processes was 2, now 1" in refused.stderr
    assert f"ptuning convert --checkpoint {checkpoint}" in refused.stderr

    assert cli.main(["convert", "--checkpoint", str(checkpoint)]) == 0
    other_batch = run_main(*full_flags(tmp_path / "run", **one | {"per_device_train_batch_size": 2}), check=False)
    assert "rows × accumulation steps × processes was 4, now 2" in other_batch.stderr
    run_main(*full_flags(tmp_path / "run", **one))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, run_main, whole):
    shutil.copytree(whole, tmp_path / "run")
    flags = full_flags(tmp_path / "run", train_sampling_strategy="random", **RUN | {"deepspeed": None})
    without = run_main(*flags, "--resume_from_checkpoint", "true", check=False)
    assert without.returncode == 2
    assert "was written by DeepSpeed ZeRO-3; give the --deepspeed file again" in without.stderr
    flags = full_flags(tmp_path / "run", **RUN | {"deepspeed": ROOT / "configs" / "zero2.json"})
    stage2 = run_main(*flags, "--resume_from_checkpoint", "true", check=False)
    assert "was written by ZeRO-3, and" in stage2.stderr and "zero2.json is stage 2" in stage2.stderr


def test_offline_export_equals_the_saved_model(tmp_path, whole, capsys):
    checkpoint = whole / "checkpoint-6"
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "merged")]) == 0
    merged, expected = weights(tmp_path / "merged"), weights(checkpoint)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    for file in ("config.json", "tokenizer.model", "ptuning_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (checkpoint / file).read_bytes()
    assert cli.main(["export", "--checkpoint", str(whole), "--output_dir", str(tmp_path / "other")]) == 2
    assert "not a DeepSpeed checkpoint" in capsys.readouterr().err
