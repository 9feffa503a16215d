"""--tokens_per_batch in the trainer: what a step has, how many there are, resuming, and what doesn't go with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ptuning.config import parse
from ptuning.errors import ConfigError
from ptuning.methods import method_of
from ptuning.methods.prefix.attach import prefix_of
from ptuning.training.batches import evaluation_batches, planned_steps, steps_an_epoch
from ptuning.training.combinations import check_combinations
from ptuning.training.estimate import estimate_run
from ptuning.training.machine import Machine
from ptuning.training.memory import need
from ptuning.training.resume import batch_conflicts
from ptuning.training.run import _banner
from ptuning.training.trainer import TuningTrainer
from ptuning.training.workload import Workload
from tests.conftest import REPO
from tests.training.test_trainer import build, some_rows  # noqa: F401

TINY = REPO / "tests" / "golden" / "chatglm2-tiny"
TRAIN = ["--do_train", "--model_name_or_path", str(TINY), "--train_file", "t.json", "--prompt_column", "q"]
TRAIN += ["--response_column", "a", "--output_dir", "out", "--report_to", "none", "--pre_seq_len", "8"]
TRAIN += ["--micro_batch_tokens", "0"]  # in pieces all large batches take the same
BY_TOKENS = {"tokens_per_batch": 50, "max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}


@pytest.fixture
def train(build, monkeypatch):  # noqa: F811
    """Trains 40 rows. Returns the trainer and the batches, each with its rows and its tokens, padding included."""

    def run(resume_from=None, **options):
        seen, compute_loss = [], TuningTrainer.compute_loss

        def watched(self, model, inputs, *args, **kwargs):
            seen.append((inputs["row"].tolist(), inputs["input_ids"].numel()))
            return compute_loss(self, model, inputs, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(TuningTrainer, "compute_loss", watched)
            trainer = build(some_rows(40), **BY_TOKENS | {"save_steps": 4} | options)
            trainer.train(resume_from_checkpoint=resume_from)
        return trainer, seen

    return run


def test_each_epoch_takes_every_row_in_as_many_steps_as_planned(train):
    trainer, seen = train()
    lengths = trainer.train_dataset.lengths
    assert trainer.state.global_step == trainer.state.max_steps == planned_steps(trainer.args, lengths)
    an_epoch = len(trainer.token_batches())
    assert len(seen) == 3 * an_epoch and an_epoch % 2  # an odd number, so that the last step of an epoch has one batch
    assert steps_an_epoch(trainer.args, lengths) == (an_epoch + 1) // 2
    epochs = [seen[start : start + an_epoch] for start in range(0, len(seen), an_epoch)]
    for epoch in epochs:
        assert sorted(row for rows, _ in epoch for row in rows) == list(range(40))
    assert len({str(epoch) for epoch in epochs}) == 3
    assert max(size for _, size in seen) <= 50 < 40 * lengths.mean()
    assert len({len(rows) for rows, _ in seen}) > 1


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_is_the_same_to_the_bit(train, tmp_path, step):
    """From the middle of an epoch and from near its end."""
    trainer, whole = train()
    expected = prefix_of(trainer.model).embedding.weight.detach().clone()
    resumed, rest = train(str(tmp_path / "run" / f"checkpoint-{step}"))
    assert rest and rest == whole[-len(rest) :]
    assert torch.equal(prefix_of(resumed.model).embedding.weight, expected)


def test_the_gradient_is_that_of_the_same_rows_in_one_batch(build):  # noqa: F811
    """Rows of different lengths in batches of different sizes: every label counts the same."""

    def prefix_after(**options):
        trainer = build(some_rows(12), max_steps=1, **options)
        prefix_of(trainer.model).dropout.p = 0.0
        trainer.train()
        return prefix_of(trainer.model).embedding.weight.detach()

    by_tokens = prefix_after(tokens_per_batch=50, gradient_accumulation_steps=100)
    assert torch.allclose(by_tokens, prefix_after(per_device_train_batch_size=12), atol=1e-5)


def test_the_banner_says_what_a_step_is(build):  # noqa: F811
    trainer = build(some_rows(40), **BY_TOKENS)
    sampler = trainer.token_batches()
    text = _banner(trainer, None)
    batch = 40 / len(sampler)
    assert f"effective batch about {2 * batch:.1f} rows = {batch:.1f} (at most 50 tokens a batch, " in text
    assert f"{sampler.padding:.1%} padding) × 2 accumulation steps × 1 processes" in text
    assert f"{3 * steps_an_epoch(trainer.args, sampler.lengths)} steps = 3.00 epochs" in text


def test_evaluation_keeps_within_the_tokens_too(build):  # noqa: F811
    rows = some_rows(30, seed=1)
    plain = build(some_rows(4), eval_rows=rows)
    by_tokens = build(some_rows(4), eval_rows=rows, tokens_per_batch=40)
    assert by_tokens.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    lengths = by_tokens.eval_dataset.lengths
    batches = [rows for rows, _ in evaluation_batches(by_tokens.args, lengths)]
    assert sorted(row for batch in batches for row in batch) == list(range(30))
    assert 40 >= max(len(batch) * lengths[batch].max() for batch in batches) > 20
    assert max(map(len, batches)) <= 16


def test_processes_evaluate_each_row_once(build, monkeypatch):  # noqa: F811
    args = build(some_rows(4), tokens_per_batch=40).args
    lengths = np.array([len(row.input_ids) for row in some_rows(29, seed=1)])
    found = []
    for rank in range(3):
        monkeypatch.setattr(type(args), "world_size", 3)
        monkeypatch.setattr(type(args), "process_index", rank)
        found.append(list(evaluation_batches(args, lengths)))
    assert len({len(batches) for batches in found}) == 1
    counted = [row for batches in found for rows, weight in batches if weight for row in rows]
    assert sorted(counted) == list(range(29))
    assert max(len(rows) * lengths[rows].max() for batches in found for rows, _ in batches) <= 40


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--per_device_train_batch_size", "4"],
            "--tokens_per_batch 4096 and --per_device_train_batch_size 4 both say how large a batch is; leave one out (an option "
            "in the --config file counts too)",
        ),
        (
            ["--pad_to_max_length", "true"],
            "--tokens_per_batch 4096 with --pad_to_max_length: all rows would be equally long",
        ),
        (
            ["--train_sampling_strategy", "random"],
            "--tokens_per_batch 4096 puts rows of similar length together, and --train_sampling_strategy is random",
        ),
        (["--auto_find_batch_size", "true"], "--tokens_per_batch 4096 with --auto_find_batch_size, which looks for"),
        (["--dataloader_drop_last", "true"], "--tokens_per_batch 4096 with --dataloader_drop_last: no batch is left"),
    ],
)
def test_what_contradicts_it_is_refused(options, text):
    with pytest.raises(ConfigError) as caught:
        parse([*TRAIN, "--tokens_per_batch", "4096", *options])
    assert str(caught.value).startswith(text) and "leave" in str(caught.value)


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "train_batch_size"])
def test_a_deepspeed_file_with_a_number_of_rows_is_refused(tmp_path, key):
    (tmp_path / "ds.json").write_text(
        f'{{"{key}": 16, "zero_optimization": {{"stage": 2}}, "gradient_clipping": "auto"}}'
    )
    config, _ = parse([*TRAIN, "--tokens_per_batch", "4096"])
    config.training.deepspeed = str(tmp_path / "ds.json")
    with pytest.raises(
        ConfigError, match=f'{key} is 16 in the file and --tokens_per_batch 4096 .* write "{key}": "auto"'
    ):
        check_combinations(config, method_of(config.model, trains=True))


def test_another_number_of_processes_would_make_other_batches(tmp_path):
    (tmp_path / "global_step2").mkdir()
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "tokens_per_batch": 4096}
    (said,) = batch_conflicts(options, options, (2, 1), tmp_path)
    assert "convert" in said
    (tmp_path / "latest_universal").write_text("x")
    (said,) = batch_conflicts(options, options, (2, 1), tmp_path)
    assert said == (
        "the number of processes was 2, now 1, which decides the batches of --tokens_per_batch; start 2 again"
    )


def estimate_of(*options, **figures):
    config, _ = parse([*TRAIN, *options])
    return estimate_run(config, method_of(config.model, trains=True), Machine(10**12, 10**12, None), **figures)


def test_the_estimate_takes_the_batch_that_needs_most():
    limits = ["--max_source_length", "1000", "--max_target_length", "99"]
    assert (work := estimate_of(*limits, "--tokens_per_batch", "4500").work).batch == 4 and work.length == 1100
    assert estimate_of(*limits, "--tokens_per_batch", "500").work.batch == 1  # a row by itself
    lengths = np.array([10] * 500 + [900])
    rows = (lengths, lengths // 2)
    long = estimate_of("--tokens_per_batch", "1000", rows=rows)
    assert "100 rows × 10 tokens" in str(long)  # each of them has its own keys and values of the prefix
    config, _ = parse([*TRAIN, "--tokens_per_batch", "1000"])
    other = Workload.of(config, method_of(config.model, trains=True), longest=(900, 450))
    assert other.batch == 1 and need(other, 0).device_peak < need(long.work, 0).device_peak


def test_the_advice_lowers_the_tokens():
    limits = ["--max_source_length", "900", "--max_target_length", "99", "--gradient_checkpointing", "true"]
    large = estimate_of(*limits, "--tokens_per_batch", "65536")
    free = large.process_rss + (large.need.host_peak - large.process_rss) // 3
    with pytest.raises(ConfigError) as caught:
        replace(large, machine=Machine(free, 10**12, None)).require_fit()
    advice = str(caught.value).split("nearest setting that fits: ")[1].split(" (about")[0].split()
    assert "--tokens_per_batch" in advice and "--per_device_train_batch_size" not in advice
    smaller = estimate_of(*limits, *advice)
    assert smaller.work.batch * smaller.work.accumulation == large.work.batch
    assert smaller.need.host_peak <= free
