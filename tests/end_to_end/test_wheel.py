"""The wheel in a virtual environment that has what the package says it needs, and nothing else; away from the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.end_to_end.conftest import MODEL, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # several processes that import torch from files not read before
PACKAGE = ROOT / "ptuning"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because setuptools leaves a folder `build` whose old files would get into the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("ptuning", "tests", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel and what its core dependencies bring, linked from this one."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (metadata,) = importlib.metadata.distributions(path=[str(site)])
    for name in needed_by(metadata.requires or []):
        for entry in importlib.metadata.files(name) or []:
            target = site / entry.parts[0]
            if entry.parts[0] not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(entry.locate())).parents[len(entry.parts) - 1] / entry.parts[0])
    return folder / "bin"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs `ptuning LINE` or another program of that environment in an empty folder. Returns that folder and the finished
    process."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def command(*line: object, program: str = "ptuning") -> tuple[Path, subprocess.CompletedProcess]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [installed / program, *map(str, line)],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return folder, done

    return command


def test_all_of_the_package_and_nothing_else(wheel):
    there = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    wanted = {name for name in there if "__pycache__" not in name and not name.endswith(".md")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"ptuning/py.typed", "ptuning/config/files/zero3.json", "ptuning/evaluation/questions/probe.jsonl"} <= wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_train_with_all_that_evaluates(run, rows_file):
    few = "--max_eval_samples 4 --max_predict_samples 4"
    folder, done = run(
        *f"train --config ptuning_official.yaml --model_name_or_path {MODEL} --train_file {rows_file}".split(),
        *f"--validation_file {rows_file} --output_dir tuned --pre_seq_len 4 --max_steps 2 --logging_steps 1".split(),
        *f"--max_source_length 32 --max_target_length 8 --do_predict --probe {few}".split(),
    )
    assert "Saved the tuned prefix in tuned" in done.stdout
    names = ("report.html", "probe.jsonl", "predictions.jsonl", "metrics.json", "loss_curve.png")
    assert [name for name in names if not (folder / "tuned" / name).is_file()] == []


def test_what_is_missing_says_the_pip_line(run):
    """Two commands in one process, because importing torch takes most of the time."""
    lines = (f"train --config full_zero3.yaml --model_name_or_path {MODEL} --train_file x", "serve")
    code = f"from ptuning.cli import main; print([main(line.split()) for line in {lines}])"
    _, done = run("-c", code, program="python")
    assert done.stdout == "[2, 2]\n"
    for said, extra in zip(done.stderr.splitlines(), ("ptuning[full]", "ptuning[serve]"), strict=True):
        assert f"is not installed; pip install '{extra}'" in said


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def needed_by(requirements: list[str]) -> set[str]:
    """Names of the distributions that these need, and those that they need."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        assert importlib.metadata.version(requirement.name) in requirement.specifier, str(requirement)
        if not requirement.extras and requirement.name in found:
            continue
        found.add(requirement.name)
        for text in importlib.metadata.requires(requirement.name) or []:
            waiting += [(Requirement(text), extra) for extra in ("", *requirement.extras)]
    return found
