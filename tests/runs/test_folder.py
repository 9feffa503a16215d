"""What a run leaves in its folder, and what is taken away when another one begins there."""

import json

import pytest

from ptuning.errors import ConfigError, DataError
from ptuning.runs import RunFolder, RunRecord
from ptuning.runs.folder import step_of


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def make(folder, *names):
    """Files; a name that ends in / is a folder with a file in it."""
    for name in names:
        path = folder / name / "file" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": ""}) if path.name == "ptuning_config.json" else "{}")
    return RunFolder(folder)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_evaluation_does_not_replace_the_record_of_the_training(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    folder.write_record(RunRecord({"seed": 1}))
    folder.write_record(RunRecord({"seed": 2}), trains=False)
    for step in (20, 100):
        folder.write_record(RunRecord({"seed": step}, resumed_from=f"x/checkpoint-{step}"))
    assert read(folder / "run.json")["config"]["seed"] == 1
    assert read(folder / "evaluation.json")["config"]["seed"] == 2
    assert read(folder / "run-resumed-20.json")["config"]["seed"] == 20
    assert folder.resumes() == [20, 100]
    assert folder.latest_record()["config"]["seed"] == 100
    # A checkpoint belongs to the last run that was resumed before it.
    assert [folder.record_at(step).config["seed"] for step in (10, 20, 30, 100, 110)] == [1, 1, 20, 20, 100]


def test_a_damaged_record(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.record_at(5) is None and folder.latest_record() == {}
    (tmp_path / "run.json").write_text("{")
    assert folder.latest_record() == {}
    with pytest.raises(DataError, match=r"run\.json: can't be read as JSON"):
        folder.record_at(5)


def test_an_older_record(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"seed": 1}, "world_size": 2, "gone": 1}))
    record = RunFolder(tmp_path).record_at(5)
    assert (record.config, record.world_size, record.rows_sha256) == ({"seed": 1}, 2, None)


def test_splits_that_an_earlier_command_saw_stay(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_data({"train": {"rows": 5}, "test": {"rows": 1}})
    folder.write_data({"test": {"rows": 2}})
    assert read(tmp_path / "data.json") == {"train": {"rows": 5}, "test": {"rows": 2}}
    (tmp_path / "data.json").write_text("{damaged")
    folder.write_data({"test": {"rows": 2}})
    assert read(tmp_path / "data.json") == {"test": {"rows": 2}}


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    folder = make(tmp_path, "checkpoint-20/", "checkpoint-100/", "checkpoint-3/", "checkpoint-best/", "checkpoint-7")
    assert [step_of(path) for path in folder.checkpoints()] == [3, 20, 100]


RESULTS = ["checkpoint-5/", "ptuning_config.json", "prefix-0123abcd.safetensors", "ptuning_full.json", "metrics.json"]
RESULTS += ["predictions.jsonl", "predictions_base.jsonl", "predictions.part0.jsonl", "probe.jsonl", "probe_base.jsonl"]
RESULTS += ["log.jsonl"]
ABOUT = ["run.json", "run-resumed-5.json", "evaluation.json", "data.json", "best.json", "outcome.json", "report.html"]
ABOUT += ["loss_curve.png", "trainer_state.json", ".saving/", ".ptuning-0123.tmp", "predictions_validation.jsonl"]
ABOUT += ["runs/Nov24_host/events.out.tfevents.1.host"]
MODEL = ["ptuning_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
MODEL += ["tokenizer.model", "tokenizer_config.json", "generation_config.json"]
OWN = [
    "notes.txt",
    "train.json",
    "checkpoint-best/",
    "runs/notes.txt",
    "sub/predictions.jsonl",
    "prefix-mine.safetensors",
]
OWN += ["predictions_mine.jsonl", "run-notes.json"]


@pytest.mark.parametrize("name", RESULTS)
def test_work_is_never_overwritten_by_accident(tmp_path, name):
    folder = make(tmp_path, name)
    assert folder.holds_run()
    with pytest.raises(ConfigError) as caught:
        folder.require_room(False, {})
    for words in (name.rstrip("/"), "--resume_from_checkpoint true", "--overwrite_output_dir", "--output_dir"):
        assert words in str(caught.value)
    folder.require_room(True, {})


def test_a_run_that_left_nothing_is_no_obstacle(tmp_path):
    folder = make(tmp_path, *ABOUT, *OWN)
    assert not folder.holds_run()
    folder.require_room(False, {})


def test_a_new_run_finds_nothing_of_the_old_one_and_everything_else(tmp_path):
    folder = make(tmp_path, *RESULTS, *ABOUT, *MODEL, *OWN)
    folder.clear()
    assert names(tmp_path) == sorted(name + "file" if name.endswith("/") else name for name in OWN)
    assert not (tmp_path / "runs" / "Nov24_host").exists()


@pytest.mark.parametrize("manifest", [None, "", "{damaged", '{"file": "prefix-0123abcd.safetensors"}'])
def test_a_model_from_elsewhere_stays(tmp_path, manifest):
    """Also where a prefix lies beside it: that one's manifest says nothing of the model."""
    folder = make(tmp_path, *(name for name in MODEL if name != "ptuning_config.json"))
    if manifest is not None:
        (tmp_path / "ptuning_config.json").write_text(manifest)
    assert folder.holds_run()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no run of this program wrote"):
            folder.require_room(overwrite, {})
    before = set(names(tmp_path))
    folder.clear()
    assert before - set(names(tmp_path)) <= {"ptuning_config.json"}


def test_the_tensors_of_any_method_go_too(tmp_path):
    folder = make(tmp_path, "biases.safetensors", "other.safetensors")
    (tmp_path / "ptuning_config.json").write_text('{"method": "biases", "file": "biases.safetensors"}')
    folder.clear()
    assert names(tmp_path) == ["other.safetensors"]


def test_a_model_of_an_earlier_version_is_ours(tmp_path):
    folder = make(tmp_path, "ptuning_full.json", *MODEL[1:])
    folder.require_room(True, {})
    folder.clear()
    assert not names(tmp_path)


@pytest.mark.parametrize("source", ["", "checkpoint-5", "../link"])
def test_what_a_run_starts_from_is_not_deleted(tmp_path, source):
    folder = make(tmp_path / "run", "checkpoint-5/", "ptuning_config.json", "other/ptuning_config.json")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    start = tmp_path / "run" / source
    with pytest.raises(ConfigError) as caught:
        folder.require_room(True, {"--ptuning_checkpoint": start})
    assert f"--overwrite_output_dir would delete {start}, which --ptuning_checkpoint starts from" in str(caught.value)
    with pytest.raises(ConfigError, match="which --baseline_from reads"):
        folder.require_room(True, {"--baseline_from": str(start)})
    folder.require_room(True, {"--ptuning_checkpoint": tmp_path / "run" / "other", "--baseline_from": None})
