"""The scripts a user types, on a .venv that is already made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, MODEL, ROOT

DATA = ROOT / "data" / "advertise"


def bash(script, *args, cwd=ROOT, **env):
    return subprocess.run(
        ["bash", str(script), *map(str, args)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """This one, with a .venv whose Python starts fast; the one that scripts/setup.sh made serves in test_serving_process.py."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("ptuning", "configs", "data", "models", "requirements.lock"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(BIN / "python")
    wanted = subprocess.run(["cksum"], stdin=(ROOT / "requirements.lock").open("rb"), capture_output=True, check=True)
    (folder / ".venv" / ".installed").write_bytes(wanted.stdout)
    return folder


def test_train_ptuning_on_the_embedded_default(checkout, tmp_path):
    small = ["--max_steps", 2, "--max_eval_samples", 4, "--max_predict_samples", 4, "--output_dir", tmp_path / "run"]
    done = bash(checkout / "scripts" / "train_ptuning.sh", *small)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "setup: installing" not in done.stdout  # a second run installs nothing
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith(("base ", "tuned "))}
    assert rows.keys() == {"base", "tuned"}
    assert f"ptuning chat --ptuning_checkpoint {tmp_path}/run" in done.stdout


def test_train_ptuning_on_another_model_from_another_directory(checkout, tmp_path):
    done = bash(
        checkout / "scripts" / "train_ptuning.sh",
        *("--max_steps", 1, "--max_eval_samples", 2, "--max_predict_samples", 2, "--output_dir", "here"),
        cwd=tmp_path,
        MODEL=str(MODEL),
        TRAIN_FILE=str(DATA / "train.json"),
        VALIDATION_FILE=str(DATA / "dev.json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "effective batch 16" in done.stdout
    assert (tmp_path / "here" / "metrics.json").is_file()


def test_setup_says_what_is_missing(tmp_path):
    """A copy of the scripts on a machine without Python."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cksum", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = bash(tmp_path / "scripts" / "test.sh", PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert "no Python 3.11 or newer found" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_no_package_index_and_no_machine_path_in_the_repo():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    needles = ("index" + "-url", "find" + "-links", "trust_remote_code" + "=True")
    for name in tracked.stdout.splitlines():
        if name.endswith((".py", ".sh", ".toml", ".lock", ".yaml", ".json", ".md")) and "data/" not in name:
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not [needle for needle in needles if needle in text], name
