"""A base divided among two processes, or placed by a device map, answers as one process does."""

import json
import os
import subprocess

import pytest

from tests.end_to_end.conftest import BIN, MODEL, ROOT
from tests.end_to_end.divided import SCRIPT, answers
from tests.serving.conftest import prefix_folders

__all__ = ["prefix_folders"]  # a fixture

DATA = str(ROOT / "data" / "advertise" / "dev.json")


@pytest.fixture(scope="module")
def alone(prefix_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, answers(folder, str(prefix_folders["ads"]), str(MODEL), DATA, [])


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_two_processes_answer_as_one(alone, prefix_folders, tmp_path):
    command = [BIN / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    asked = [tmp_path, prefix_folders["ads"], MODEL, DATA]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *asked], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-6000:]
    folder, one = alone
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert first["keys"] == second["keys"] == [one["keys"][0] // 2, one["keys"][1]], "each has half"
    for found in (first, second):
        assert found["logits"] == pytest.approx(one["logits"], abs=1e-4) and found["generated"] == one["generated"]
    assert first["served"] == one["served"] and len(one["served"]) == 4 and second["served"] == [[0]]
    assert first["chat"] == one["chat"] and not second["chat"], "the first process speaks"
    assert lines_of(tmp_path / "answers.jsonl") == lines_of(folder / "answers.jsonl")
    for name in ("predictions.jsonl", "predictions_base.jsonl"):
        for mine, theirs in zip(lines_of(folder / "run" / name), lines_of(tmp_path / "run" / name), strict=True):
            assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), abs=2e-4)
            assert mine == theirs
    assert not list(tmp_path.rglob("*part*"))


def test_a_device_map_answers_as_none(alone, prefix_folders, tmp_path):
    """On a machine without GPUs it places all on the CPU."""
    from ptuning.cli import main

    asked = ["--ptuning_checkpoint", str(prefix_folders["ads"]), "--device_map", "auto", "--max_predict_samples", "5"]
    asked += ["--max_target_length", "10"]
    assert main(["predict", *asked, "--file", DATA, "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert lines_of(tmp_path / "answers.jsonl") == lines_of(alone[0] / "answers.jsonl")
