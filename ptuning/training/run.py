"""One training run: output folder, trainer, resume, final checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers.trainer
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback

from ptuning import distributed
from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.partitioned import whole_shape
from ptuning.checkpoint.zero_files import known_objects_only
from ptuning.config import Config
from ptuning.data.batch import RowDataset
from ptuning.data.encode import EncodedRow
from ptuning.families import Template
from ptuning.messages import message, note
from ptuning.methods import Method
from ptuning.runs import RunFolder, RunRecord
from ptuning.runs.resume import chosen_checkpoint, is_finished
from ptuning.training.batches import planned_steps, steps_an_epoch
from ptuning.training.kernels import Kernels
from ptuning.training.progress import LiveReport, LossCurve
from ptuning.training.resume import require_same_run
from ptuning.training.trainer import TuningTrainer


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from; `finished`: the run has nothing left to do."""

    checkpoint: Path
    finished: bool


def make_room(config: Config, folder: RunFolder, delete: bool) -> None:
    """Settles what happens to an earlier run in the folder of a new one. A run that is resumed leaves everything.

    Args:
        delete: what belonged to the earlier run, just before the new one writes; else only ask whether that may be done.

    Raises:
        ConfigError: an earlier run is there and no flag says what to do with it, or the new run reads what would be deleted.
    """
    if chosen_checkpoint(folder, config.training.resume_from_checkpoint) is not None:
        return
    sources = {
        "--ptuning_checkpoint": config.model.ptuning_checkpoint,
        "--model_name_or_path": config.model.model_name_or_path,
        "--baseline_from": config.generation.baseline_from,
    }
    folder.require_room(config.training.overwrite_output_dir, sources)
    if delete:
        folder.clear()


def checkpoint_to_resume(
    config: Config, folder: RunFolder, now: RunRecord, lengths: np.ndarray, say: Callable[[str], None]
) -> Resume | None:
    """The checkpoint that the run goes on from, None for a new run.

    Args:
        now: the record of this run.
        lengths: of the training rows, in tokens.
        say: prints on the main process.

    Raises:
        ConfigError: there is nothing to resume, or resuming would not be exact.
    """
    checkpoint = chosen_checkpoint(folder, config.training.resume_from_checkpoint)
    if checkpoint is None:
        return None
    for text in require_same_run(checkpoint, now, config.training):
        say(note(text))
    finished = is_finished(checkpoint, planned_steps(config.training, lengths))
    if finished:
        say(message("finished", checkpoint=checkpoint))
    return Resume(checkpoint, finished)


def build_trainer(
    config: Config,
    model: PreTrainedModel,
    template: Template,
    method: Method | None,
    rows: Mapping[str, Sequence[EncodedRow]],
    manifest: Manifest | None,
    score_answers: Callable[[], dict[str, float]] | None = None,
    live: LiveReport | None = None,
    kernels: Kernels | None = None,
) -> TuningTrainer:
    """The trainer for training or for the eval loss alone.

    Args:
        rows: split name → encoded rows; train and validation are used where they are there.
        method: what is tuned.
        manifest: written into every checkpoint.
        score_answers: see TuningTrainer.
        live: the report of the run, for as long as it trains.
        kernels: that the model was built with; default: plain, whole batches.
    """
    args, data = config.training, config.data
    callbacks: list[TrainerCallback] = [LossCurve(RunFolder(args.output_dir))] if args.do_train else []
    if live is not None:
        callbacks.append(live)  # after the log that it shows
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    trainer = TuningTrainer(
        model=model,
        args=args,
        template=template,
        method=method,
        manifest=manifest,
        pad_to=data.max_source_length + data.max_target_length + 1 if data.pad_to_max_length else None,
        train_dataset=RowDataset(rows["train"]) if "train" in rows else None,
        eval_dataset=RowDataset(rows["validation"]) if "validation" in rows else None,
        callbacks=callbacks,
        score_answers=score_answers,
        micro_batch_tokens=0 if kernels is None else kernels.micro_batch_tokens,
    )
    distributed.check(args.deepspeed is not None, trainer.is_deepspeed_enabled, trainer.accelerator.num_processes)
    return trainer


def train(
    config: Config,
    trainer: TuningTrainer,
    resume_from: str | None,
    say: Callable[[str], None],
) -> None:
    """Trains and saves. The tuned checkpoint is written into the output folder itself, after the last step.

    Args:
        resume_from: from `checkpoint_to_resume`.
        say: prints on the main process.
    """
    args = config.training
    say(_banner(trainer, resume_from))
    with _deepspeed_files(trainer) if args.deepspeed else nullcontext():
        trainer.train(resume_from_checkpoint=resume_from)
    trainer.finish()
    trainer.save_model()
    trainer.save_state()
    say(message("saved", noun=trainer.method.noun, folder=args.output_dir))


@contextmanager
def _deepspeed_files(trainer: TuningTrainer) -> Iterator[None]:
    """Inside, DeepSpeed's checkpoints are read as plain data, and a prefix's without the frozen base, which they don't hold."""
    load = transformers.trainer.deepspeed_load_checkpoint

    def load_what_was_tuned(engine, path, load_module_strict=True):
        load(engine, path, load_module_strict=not trainer.method.keeps_base)

    transformers.trainer.deepspeed_load_checkpoint = load_what_was_tuned
    try:
        with known_objects_only():
            yield
    finally:
        transformers.trainer.deepspeed_load_checkpoint = load


def _banner(trainer: TuningTrainer, resume_from: str | None) -> str:
    args = trainer.args
    trainable = sum(whole_shape(p).numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(whole_shape(p).numel() for p in trainer.model.parameters())
    rows = len(trainer.train_dataset)
    lines = [
        message("trainable", trainable=trainable, total=total, share=trainable / total, rows=rows),
        _batches(trainer),
        message("schedule", rate=args.learning_rate, schedule=args.lr_scheduler_type.value, device=args.device),
        *([message("divided_rows", processes=args.sequence_parallel)] if args.sequence_parallel else []),
        *([message("row_averages")] if args.loss_average == "rows" else []),
    ]
    if resume_from:
        lines.append(message("continuing", checkpoint=resume_from))
    return "\n".join(lines)


def _batches(trainer: TuningTrainer) -> str:
    """The line of the banner on what a step and an epoch are."""
    args, sampler, lengths = trainer.args, trainer.token_batches(), trainer.train_dataset.lengths
    steps = planned_steps(args, lengths)
    known = {"accumulation": args.gradient_accumulation_steps, "processes": args.row_takers, "steps": steps}
    at_once = args.gradient_accumulation_steps * args.row_takers
    if sampler is None:
        batch = args.per_device_train_batch_size
        epochs = steps * batch * at_once / len(lengths)
        return message("steps", effective=batch * at_once, batch=batch, epochs=epochs, **known)
    batch, epochs = len(lengths) / len(sampler), steps / steps_an_epoch(args, lengths)
    return message(
        "token_steps",
        effective=batch * at_once,
        batch=batch,
        tokens=args.tokens_per_batch,
        padding=sampler.padding,
        epochs=epochs,
        **known,
    )
