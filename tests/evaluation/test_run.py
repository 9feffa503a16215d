"""What a run's evaluation refuses, and what it says in the end. What it does: tests/end_to_end/test_evaluation.py."""

import pytest

from ptuning.checkpoint.full import FullDescription
from ptuning.config import parse
from ptuning.data.encode import Encoder, Lengths
from ptuning.errors import ConfigError
from ptuning.evaluation import run
from ptuning.evaluation.run import Evaluation
from ptuning.loading import load_model
from tests.end_to_end.conftest import MODEL


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


def evaluation(loaded, tmp_path, *flags) -> Evaluation:
    command = [
        "--do_predict",
        "--model_name_or_path",
        str(MODEL),
        "--test_file",
        "t.json",
        "--output_dir",
        str(tmp_path),
    ]
    return Evaluation(parse([*command, *flags])[0], *loaded, Encoder(loaded[1], Lengths(64, 16)), print)


@pytest.mark.parametrize("flag", ["--baseline", "--probe"])
def test_a_tuned_model_has_no_base_in_its_folder(loaded, tmp_path, monkeypatch, flag):
    evaluation(loaded, tmp_path, flag)  # an untuned model is its own base
    monkeypatch.setattr(run, "read_full", lambda folder: object.__new__(FullDescription))
    evaluation(loaded, tmp_path)
    with pytest.raises(
        ConfigError, match=f"{flag}: the base that .*chatglm2-tiny was tuned from is not in that folder"
    ):
        evaluation(loaded, tmp_path, flag)


def test_a_folder_without_a_base_is_refused_before_anything_is_answered(loaded, tmp_path):
    with pytest.raises(ConfigError, match=r"has no scores of a base .* evaluate the untuned base into it first"):
        evaluation(loaded, tmp_path, "--baseline_from", str(tmp_path / "nothing"))


def test_a_base_without_a_probe_is_refused_too(loaded, tmp_path):
    (tmp_path / "metrics.json").write_text('{"base": {}}')
    (tmp_path / "predictions_base.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has no probe_base\.jsonl; evaluate the base again with --probe"):
        evaluation(loaded, tmp_path, "--probe", "--baseline_from", str(tmp_path))


def test_the_summary_of_a_probe_without_losses(loaded, tmp_path):
    made = evaluation(loaded, tmp_path)
    made.results["probe"] = {"rows": 4, "same": 25.0, "base_loss": None, "tuned_loss": None, "change": None}
    assert made.summary() == "Probe: 25 % of 4 general answers unchanged"
