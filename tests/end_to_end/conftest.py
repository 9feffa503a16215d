"""Real processes on the small model in the repo."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import WARM_BIN

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "chatglm2-tiny"
BIN = WARM_BIN


@pytest.fixture(scope="session", autouse=True)
def commands(warm_bin) -> None:
    """All of BIN is there."""


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """The first rows of the demo data."""
    lines = (ROOT / "data" / "advertise" / "train.json").read_text(encoding="utf-8").splitlines()[:64]
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run_main():
    """Runs `LAUNCHER… ptuning/main.py FLAGS…` as a user would, from another directory. Returns the finished process."""

    def run(*flags, launcher=(BIN / "python",), script="ptuning/main.py", cwd=None, check=True, **env):
        command = [*map(str, launcher), str(ROOT / script), *map(str, flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | env
        done = subprocess.run(command, cwd=cwd or "/", env=environment, text=True, capture_output=True, timeout=600)
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def wait_until():
    """Waits until something holds, as long as the process that brings it about lives."""

    def wait(holds: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    return wait


def wait_for_end(folder: Path) -> None:
    """Until the process that a run's lock names is gone: one that is killed closes its files a moment before."""
    pid = json.loads((folder / "run.lock").read_text(encoding="utf-8"))["pid"]
    while psutil.pid_exists(pid):
        time.sleep(0.005)


@pytest.fixture
def train_flags(rows_file):
    """A short P-Tuning run; further flags override."""

    def flags(output_dir, **more) -> list[str]:
        options = {
            "model_name_or_path": MODEL,
            "train_file": rows_file,
            "prompt_column": "content",
            "response_column": "summary",
            "output_dir": output_dir,
            "pre_seq_len": 8,
            "learning_rate": 2e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "max_source_length": 64,
            "max_target_length": 64,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
        } | more
        return ["--do_train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]

    return flags


def losses(output_dir: Path) -> dict[int, float]:
    """Step → loss, from the run's log."""
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.fixture
def two_processes(free_port) -> tuple:
    """torchrun with two processes on a port of their own."""
    return BIN / "torchrun", "--nnodes=1", "--nproc-per-node=2", f"--master-port={free_port}"


def full_flags(output_dir, **more) -> list[str]:
    """A short run that tunes all weights, two rows a process and step; further options override, None takes one out."""
    data = ROOT / "data" / "advertise"
    options = {
        "do_train": True,
        "method": "full",
        "model_name_or_path": MODEL,
        "train_file": data / "train.json",
        "prompt_column": "content",
        "response_column": "summary",
        "output_dir": output_dir,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_source_length": 48,
        "max_target_length": 48,
        "max_train_samples": 48,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    } | more
    return [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
