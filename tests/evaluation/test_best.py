"""The best checkpoint: by which score, and how it is named."""

import json
from types import SimpleNamespace

import pytest

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.evaluation.best import resolve_best_metric, write_best


def config_with(tmp_path, *flags):
    command = (
        f"--do_train --model_name_or_path m --train_file t.json --validation_file v.json --output_dir {tmp_path} "
        "--prompt_column a --response_column b --pre_seq_len 8 --save_steps 10"
    )
    return parse([*command.split(), *flags])[0]


def test_nothing_is_changed_where_nothing_was_asked(tmp_path):
    config = config_with(tmp_path)
    assert resolve_best_metric(config.training) is False
    assert not config.training.load_best_model_at_end


@pytest.mark.parametrize(
    ("name", "metric", "greater", "must_score"),
    [
        ("eval_loss", "eval_loss", False, False),
        ("loss", "eval_loss", False, False),
        ("bleu-4", "eval_bleu-4", True, True),
        ("eval_rouge-l", "eval_rouge-l", True, True),
        ("chrf", "eval_chrf", True, True),
        ("repeating", "eval_repeating", False, True),
        ("cut", "eval_cut", False, True),
    ],
)
def test_every_score_knows_its_direction(tmp_path, name, metric, greater, must_score):
    config = config_with(tmp_path, "--metric_for_best_model", name)
    assert resolve_best_metric(config.training) is must_score
    args = config.training
    assert (args.metric_for_best_model, args.greater_is_better) == (metric, greater)
    assert args.load_best_model_at_end


def test_patience_alone_watches_the_loss(tmp_path):
    config = config_with(tmp_path, "--early_stopping_patience", "3")
    assert resolve_best_metric(config.training) is False
    assert config.training.metric_for_best_model == "eval_loss"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric_for_best_model", "blue-4"], "blue-4: no such score; did you mean bleu-4"),
        (["--metric_for_best_model", "zzz"], "no such score; there are loss, perplexity, bleu-4"),
        (["--metric_for_best_model", "length_ratio"], "neither more nor less of it is better"),
        (["--metric_for_best_model", "chrf", "--eval_steps", "4"], r"--eval_steps 4 \(steps\) and --save_steps 10"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        resolve_best_metric(config_with(tmp_path, *flags).training)


def test_it_needs_rows_to_evaluate_on():
    command = (
        "--do_train --model_name_or_path m --train_file t --output_dir o --pre_seq_len 8 --metric_for_best_model chrf"
    )
    with pytest.raises(ConfigError, match="--metric_for_best_model needs --validation_file"):
        parse(command.split())


def test_a_checkpoint_is_due_at_every_evaluation(tmp_path):
    command = "--do_train --model_name_or_path m --train_file t --validation_file v --pre_seq_len 8 --eval_steps 7"
    config = parse([*command.split(), "--output_dir", str(tmp_path), "--metric_for_best_model", "chrf"])[0]
    assert config.training.save_steps == 7
    resolve_best_metric(config.training)


def test_the_best_is_named(tmp_path):
    state = SimpleNamespace(best_model_checkpoint=f"{tmp_path}/checkpoint-20", best_global_step=20, best_metric=12.5)
    assert write_best(tmp_path, state, "eval_chrf").startswith("Best: checkpoint-20 with eval_chrf 12.5000")
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "checkpoint-20", "step": 20, "metric": "eval_chrf", "value": 12.5}


def test_without_an_evaluation_there_is_no_best(tmp_path):
    assert write_best(tmp_path, SimpleNamespace(best_model_checkpoint=None), "eval_loss") is None
    assert not (tmp_path / "best.json").exists()
