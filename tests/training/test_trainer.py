"""The trainer: what it saves, when it stops, and that the base stays as it is."""

import contextlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from ptuning.checkpoint.manifest import describe
from ptuning.config import TuningArguments
from ptuning.data.batch import RowDataset
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.errors import TrainingError
from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.kernels.compiled import CompiledLayer
from ptuning.methods import PrefixMethod
from ptuning.methods.prefix.attach import prefix_of
from ptuning.methods.prefix.read import read_prefix
from ptuning.runs import RunFolder
from ptuning.runs.folder import STAGING
from ptuning.training.progress import LossCurve
from ptuning.training.trainer import TuningTrainer


class Tokenizer:
    pad_token_id = 0
    model_input_names = ("input_ids",)


def some_rows(count: int, seed: int = 0) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        prompt, answer = (int(torch.randint(3, 12, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(3, 320, (prompt + answer,), generator=generator).tolist()
        rows.append(EncodedRow(ids, [IGNORE] * prompt + ids[prompt:], f"rows.json:{index + 1}"))
    return rows


@pytest.fixture
def build(golden_dir, tmp_path):
    def make(rows, *, eval_rows=None, callbacks=(), micro_batch_tokens=0, **options) -> TuningTrainer:
        base = golden_dir / "chatglm2-tiny"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        method = PrefixMethod(8)
        method.start(model)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "max_steps": 4,
            "report_to": "none",
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        }
        return TuningTrainer(
            model=model,
            args=TuningArguments(**settings | options),
            template=ChatGLM2Template(Tokenizer()),
            method=method,
            manifest=describe(base, method.name, method.settings()),
            train_dataset=RowDataset(rows),
            eval_dataset=RowDataset(eval_rows) if eval_rows else None,
            callbacks=list(callbacks),
            micro_batch_tokens=micro_batch_tokens,
        )

    return make


def test_only_the_prefix_changes(build):
    trainer = build(some_rows(16))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    trainer.train()
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert trainable == changed == ["prefix_encoder.embedding.weight"]


def test_checkpoints_are_complete_and_staging_is_gone(build, tmp_path):
    trainer = build(some_rows(16), save_total_limit=1)
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-4"]
    assert not (tmp_path / "run" / STAGING).exists()
    saved = read_prefix(tmp_path / "run" / "checkpoint-4").tensors["embedding.weight"]
    assert torch.equal(saved, prefix_of(trainer.model).embedding.weight)
    for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (tmp_path / "run" / "checkpoint-4" / file).is_file()
    assert not list((tmp_path / "run").rglob("training_args.bin"))  # a pickle that nothing needs


def test_a_kill_while_saving_leaves_no_half_checkpoint(build, tmp_path, monkeypatch):
    trainer = build(some_rows(16))

    def dies(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(TuningTrainer, "_save_rng_state", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.undo()
    build(some_rows(16)).train()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    assert not (tmp_path / "run" / STAGING).exists()


def test_non_finite_loss_stops_and_names_step_and_samples(build, tmp_path):
    trainer = build(some_rows(16), train_sampling_strategy="sequential")
    inner = trainer.model.forward

    def poisoned(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        if trainer.state.global_step == 2:
            outputs["logits"] = outputs["logits"] * float("nan")
        return outputs

    trainer.model.forward = poisoned
    with pytest.raises(TrainingError) as error:
        trainer.train()
    text = str(error.value)
    assert "step 3: the loss is nan on rows.json:9, rows.json:10, rows.json:11, rows.json:12" in text
    assert f"The last good checkpoint is {tmp_path}/run/checkpoint-2." in text
    assert all(torch.isfinite(t).all() for t in read_prefix(tmp_path / "run" / "checkpoint-2").tensors.values())


def test_non_finite_gradient_stops_before_the_step(build):
    trainer = build(some_rows(16))
    before = prefix_of(trainer.model).embedding.weight.detach().clone()
    prefix_of(trainer.model).embedding.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the gradient norm is"):
        trainer.train()
    assert torch.equal(prefix_of(trainer.model).embedding.weight, before)


def test_eval_loss_does_not_depend_on_the_batch_size(build):
    rows = some_rows(13, seed=1)
    by_size = {}
    for size in (1, 5, 13):
        trainer = build(some_rows(4), eval_rows=rows, per_device_eval_batch_size=size)
        by_size[size] = trainer.evaluate()["eval_loss"]
    assert by_size[5] == pytest.approx(by_size[1], rel=1e-6)
    assert by_size[13] == pytest.approx(by_size[1], rel=1e-6)
    model = trainer.model.eval()
    total = tokens = 0
    for row in rows:
        labels = torch.tensor([row.labels])
        count = int((labels[:, 1:] != IGNORE).sum())
        total += float(model(torch.tensor([row.input_ids]), labels=labels).loss) * count
        tokens += count
    assert by_size[1] == pytest.approx(total / tokens, rel=1e-5)


def test_gradient_accumulation_is_one_large_batch(build):
    def prefix_after(**options):
        trainer = build(some_rows(16), train_sampling_strategy="sequential", max_steps=2, **options)
        prefix_of(trainer.model).dropout.p = 0.0
        trainer.train()
        return prefix_of(trainer.model).embedding.weight.detach()

    whole = prefix_after(per_device_train_batch_size=8)
    split = prefix_after(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert torch.allclose(whole, split, atol=1e-5)


def test_checkpointing_on_and_off_train_the_same_prefix(build):
    def prefix_after(**options):
        trainer = build(some_rows(16), **options)
        trainer.train()
        return prefix_of(trainer.model).embedding.weight.detach()

    assert torch.allclose(prefix_after(), prefix_after(gradient_checkpointing=True), atol=1e-6)


def test_early_stopping_keeps_the_best(build, tmp_path):
    from transformers import EarlyStoppingCallback

    trainer = build(
        some_rows(8),
        eval_rows=some_rows(8, seed=5),  # unrelated rows: the eval loss goes up sooner or later
        callbacks=[EarlyStoppingCallback(2), LossCurve(RunFolder(tmp_path / "run"))],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=200,
        learning_rate=0.3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.global_step < 200
    best = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert torch.equal(prefix_of(trainer.model).embedding.weight, read_prefix(best).tensors["embedding.weight"])
    evals = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == min(evals)


def test_log_and_curve_are_written(build, tmp_path):
    build(some_rows(8), callbacks=[LossCurve(RunFolder(tmp_path / "run"))]).train()
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert all(math.isfinite(entry["grad_norm"]) for entry in entries if "loss" in entry)
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_writing_the_report_is_no_training_time(build, monkeypatch):
    paused = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            paused.append(inside[0])

    trainer, inside = build(some_rows(16), callbacks=[Watch()]), [False]
    original = trainer._throughput.paused

    @contextlib.contextmanager
    def watched():
        with original():
            inside[0] = True
            yield
            inside[0] = False

    monkeypatch.setattr(trainer._throughput, "paused", watched)
    trainer.train()
    assert paused and all(paused)


def test_compiled_are_the_layers_and_not_the_model_as_a_whole(build):
    """accelerate would write all layers out one after the other, and compile each."""
    trainer = build(some_rows(4), torch_compile=True, torch_compile_backend="eager")
    assert all(isinstance(layer, CompiledLayer) for layer in trainer.model.model.layers)
    assert trainer.accelerator.prepare_model(trainer.model) is trainer.model
    assert not isinstance(build(some_rows(4)).model.model.layers[0], CompiledLayer)
