"""What a run leaves behind about itself."""

import json

import pytest

from ptuning.training.record import outcome, write_data, write_run


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_outcome_of_a_run_that_finished(tmp_path):
    with outcome(tmp_path):
        pass
    found = read(tmp_path / "outcome.json")
    assert (found["status"], found["error"]) == ("finished", None)
    assert found["started"] <= found["ended"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(ValueError("boom"), "failed", "ValueError: boom"), (KeyboardInterrupt(), "interrupted", None)],
)
def test_outcome_of_a_run_that_did_not(tmp_path, error, status, text):
    with pytest.raises(type(error)), outcome(tmp_path):
        raise error
    found = read(tmp_path / "outcome.json")
    assert (found["status"], found["error"]) == (status, text)


def test_an_evaluation_does_not_replace_the_record_of_the_training(tmp_path):
    write_run(tmp_path, {"seed": 1}, {}, 1, None)
    write_run(tmp_path, {"seed": 2}, {}, 1, None, trains=False)
    write_run(tmp_path, {"seed": 3}, {}, 1, "checkpoint-20")
    assert read(tmp_path / "run.json")["config"]["seed"] == 1
    assert read(tmp_path / "evaluation.json")["config"]["seed"] == 2
    assert read(tmp_path / "run-resumed-20.json")["config"]["seed"] == 3


def test_splits_that_an_earlier_command_saw_stay(tmp_path):
    write_data(tmp_path, {"train": {"rows": 5}, "test": {"rows": 1}})
    write_data(tmp_path, {"test": {"rows": 2}})
    assert read(tmp_path / "data.json") == {"train": {"rows": 5}, "test": {"rows": 2}}
