"""What a run's evaluation refuses, what needs the base, and what it says in the end. What it does:
tests/end_to_end/test_evaluation.py."""

from pathlib import Path

import pytest

from ptuning.config import parse
from ptuning.data.encode import Encoder, Lengths
from ptuning.errors import ConfigError
from ptuning.evaluation import run
from ptuning.evaluation.answers import GenerationOptions
from ptuning.evaluation.model import LocalModel
from ptuning.evaluation.predictions import Questions
from ptuning.evaluation.run import Evaluation, EvaluationSettings
from ptuning.families import family_of
from ptuning.loading import load_model
from ptuning.methods import FullMethod, PrefixMethod, attached
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix
from ptuning.runs import RunFolder
from tests.end_to_end.conftest import MODEL

NO_QUESTIONS = Questions([], [])
TUNED_BEFORE = "the base that .*chatglm2-tiny was tuned from is not in that folder"


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


def evaluation(loaded, tmp_path, method=None, **asked) -> Evaluation:
    model, tokenizer = loaded
    settings = EvaluationSettings(RunFolder(tmp_path), GenerationOptions(16), str(MODEL), **asked)
    template = family_of(model.config).template(tokenizer)
    return Evaluation(settings, LocalModel(model), template, Encoder(template, Lengths(64, 16)), method, print)


@pytest.mark.parametrize("flag", ["baseline", "probe"])
def test_a_tuned_model_has_no_base_in_its_folder(loaded, tmp_path, monkeypatch, flag):
    evaluation(loaded, tmp_path, **{flag: True})  # an untuned model is its own base
    evaluation(loaded, tmp_path, PrefixMethod(8), **{flag: True})  # takes itself off
    evaluation(loaded, tmp_path, FullMethod(), trains=True, **{flag: True})  # is asked before training
    with pytest.raises(ConfigError, match=f"--{flag}: {TUNED_BEFORE}"):
        evaluation(loaded, tmp_path, FullMethod(), **{flag: True})
    monkeypatch.setattr(run, "read_manifest", lambda folder: object())
    evaluation(loaded, tmp_path)
    with pytest.raises(ConfigError, match=f"--{flag}: {TUNED_BEFORE}"):
        evaluation(loaded, tmp_path, **{flag: True})


@pytest.fixture
def prefixed(loaded):
    attach_prefix(loaded[0], 8)
    yield loaded
    detach_prefix(loaded[0])


@pytest.fixture
def asked(monkeypatch):
    """What is answered, with what is attached then; nothing is computed."""
    found = []

    def predict(model, template, questions, options, max_target_length, path, say, losses, shows_bar):
        found.append((path.name, attached(model.model)))
        return {"rows": 0}

    def probe_base(prober):
        found.append(("probe", attached(prober.answer.__closure__[-1].cell_contents.model.model)))
        return []

    monkeypatch.setattr(run, "predict", predict)
    monkeypatch.setattr(run, "probe_base", probe_base)
    monkeypatch.setattr(run, "probe_tuned", lambda prober, base: ([], {"rows": 0}))
    return found


def test_a_method_that_keeps_the_base_asks_it_afterwards(prefixed, tmp_path, asked):
    made = evaluation(prefixed, tmp_path, PrefixMethod(8), trains=True, baseline=True, probe=True)
    made.before_training(NO_QUESTIONS)
    assert asked == []
    made.after_training(NO_QUESTIONS)
    base = ("predictions_base.jsonl", None)
    assert asked == [base, ("predictions.jsonl", PrefixMethod), ("probe", None)]
    assert list(made.results) == ["base", "tuned", "probe"]


def test_what_only_the_base_can_do_happens_before_training_where_it_is_not_kept(loaded, tmp_path, asked):
    made = evaluation(loaded, tmp_path, FullMethod(), trains=True, baseline=True, probe=True)
    made.before_training(NO_QUESTIONS)
    assert [name for name, _ in asked] == ["predictions_base.jsonl", "probe"]
    asked.clear()
    made.after_training(NO_QUESTIONS)
    assert [name for name, _ in asked] == ["predictions.jsonl"]
    assert list(made.results) == ["base", "tuned", "probe"]


def test_an_untuned_model_is_its_own_base(loaded, tmp_path, asked):
    made = evaluation(loaded, tmp_path, baseline=True, probe=True)
    made.after_training(NO_QUESTIONS)
    assert [name for name, _ in asked] == ["predictions_base.jsonl", "probe"]
    assert list(made.results) == ["base"]


def test_a_folder_without_a_base_is_refused_before_anything_is_answered(loaded, tmp_path):
    with pytest.raises(ConfigError, match=r"has no scores of a base .* evaluate the untuned base into it first"):
        evaluation(loaded, tmp_path, baseline_from=tmp_path / "nothing")


def test_a_base_without_a_probe_is_refused_too(loaded, tmp_path):
    (tmp_path / "metrics.json").write_text('{"base": {}}')
    (tmp_path / "predictions_base.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"has no probe_base\.jsonl; evaluate the base again with --probe"):
        evaluation(loaded, tmp_path, probe=True, baseline_from=tmp_path)


def test_the_summary_of_a_probe_without_losses(loaded, tmp_path):
    made = evaluation(loaded, tmp_path)
    made.results["probe"] = {"rows": 4, "same": 25.0, "base_loss": None, "tuned_loss": None, "change": None}
    assert made.summary() == "Probe: 25 % of 4 general answers unchanged"


def test_the_settings_of_a_run(tmp_path):
    command = f"--do_predict --model_name_or_path m --test_file t.json --output_dir {tmp_path} --max_target_length 32 --seed 7"
    settings = EvaluationSettings.of(parse([*command.split(), "--num_beams", "4"])[0])
    assert settings.folder.path == tmp_path
    assert settings == EvaluationSettings(settings.folder, GenerationOptions(32, num_beams=4, seed=7), "m")
    command += (
        " --generation_mode official --max_source_length 64 --baseline_from b --probe --generation_batch_tokens 9"
    )
    settings = EvaluationSettings.of(parse(command.split())[0])
    official = GenerationOptions(32, batch_tokens=9, sample=True, max_length=64 + 32 + 1, seed=7)
    assert settings == EvaluationSettings(settings.folder, official, "m", baseline_from=Path("b"), probe=True)
