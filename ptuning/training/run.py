"""One training run: output folder, trainer, resume, final checkpoint."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import transformers.trainer
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ptuning import distributed
from ptuning.checkpoint import FullDescription, PrefixDescription
from ptuning.checkpoint.partitioned import whole_shape
from ptuning.checkpoint.zero_files import known_objects_only
from ptuning.config import Config
from ptuning.data.batch import RowDataset
from ptuning.data.encode import EncodedRow
from ptuning.errors import ConfigError
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.methods.prefix.attach import prefix_of
from ptuning.training.record import LossCurve, resume_conflicts
from ptuning.training.resume import deepspeed_conflicts, load_universal
from ptuning.training.trainer import TuningTrainer


def checkpoint_to_resume(config: Config, data: dict[str, str]) -> str | None:
    """Settles what happens to an earlier run in the output folder, before anything expensive.

    Args:
        data: split name → sha256.

    Returns:
        The checkpoint to continue from, None for a new run.

    Raises:
        ConfigError: an earlier run is there and no flag says what to do with it, there is nothing to resume, or resuming
            would not be exact.
    """
    training = config.training
    folder, wish = Path(training.output_dir), training.resume_from_checkpoint
    wish = None if wish is None or str(wish).lower() in ("false", "none", "") else str(wish)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if wish is None:
        if last and training.overwrite_output_dir:
            _delete_checkpoints(folder, config.model.ptuning_checkpoint)
        elif last:
            raise ConfigError(
                f"{folder} already holds {Path(last).name} of an earlier run. Continue it with --resume_from_checkpoint "
                "true, delete it with --overwrite_output_dir, or choose another --output_dir."
            )
        return None
    if wish.lower() == "true":
        if last is None:
            raise ConfigError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}")
        wish = last
    elif not (Path(wish) / "trainer_state.json").is_file():
        near = get_last_checkpoint(wish) if Path(wish).is_dir() else None
        hint = f"; did you mean {near}?" if near else " (it needs trainer_state.json)"
        raise ConfigError(f"--resume_from_checkpoint {wish}: not a checkpoint of a run{hint}")
    conflicts = deepspeed_conflicts(Path(wish), training)
    conflicts += resume_conflicts(Path(wish), config.to_dict(), data, training.world_size)
    if conflicts:
        raise ConfigError(
            f"--resume_from_checkpoint {wish} would not continue the same run: "
            + "; ".join(conflicts)
            + ". Use the old values, or start a new run from it: "
            + ("--ptuning_checkpoint" if _is_prefix_run(config) else f"--model_name_or_path {wish}")
        )
    load_universal(Path(wish), training)
    return wish


def _is_prefix_run(config: Config) -> bool:
    return config.model.pre_seq_len is not None or config.model.ptuning_checkpoint is not None


def _delete_checkpoints(folder: Path, source: str | None) -> None:
    if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--overwrite_output_dir would delete {source}, which --ptuning_checkpoint starts from; choose another "
            "--output_dir"
        )
    for old in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    for old in folder.glob("run*.json"):
        old.unlink()


def build_trainer(
    config: Config,
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    rows: dict[str, list[EncodedRow]],
    description: PrefixDescription | FullDescription,
    score_answers: Callable[[], dict[str, float]] | None = None,
) -> TuningTrainer:
    """The trainer for training or for the eval loss alone.

    Args:
        rows: split name → encoded rows; train and validation are used where they are there.
        description: of the prefix or of the fully tuned model.
        score_answers: see TuningTrainer.
    """
    args, data = config.training, config.data
    callbacks = [LossCurve(Path(args.output_dir))] if args.do_train else []
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    trainer = TuningTrainer(
        model=model,
        args=args,
        tokenizer=tokenizer,
        description=description,
        pad_to=data.max_source_length + data.max_target_length + 1 if data.pad_to_max_length else None,
        train_dataset=RowDataset(rows["train"]) if "train" in rows else None,
        eval_dataset=RowDataset(rows["validation"]) if "validation" in rows else None,
        callbacks=callbacks,
        score_answers=score_answers,
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
    trainer.save_model()
    trainer.save_state()
    what = "model" if prefix_of(trainer.model) is None else "prefix"
    say(f"Saved the tuned {what} in {args.output_dir}")


@contextmanager
def _deepspeed_files(trainer: TuningTrainer) -> Iterator[None]:
    """Inside, DeepSpeed's checkpoints are read as plain data, and a prefix's without the frozen base, which they don't hold."""
    load = transformers.trainer.deepspeed_load_checkpoint

    def load_what_was_tuned(engine, path, load_module_strict=True):
        load(engine, path, load_module_strict=prefix_of(trainer.model) is None)

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
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = len(trainer.train_dataset)
    steps = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * -(-rows // effective))
    lines = [
        f"Training {trainable:,} of {total:,} parameters ({trainable / total:.3%}) on {rows:,} rows",
        f"  effective batch {effective} = {args.per_device_train_batch_size} rows × {args.gradient_accumulation_steps} "
        f"accumulation steps × {args.world_size} processes; {steps:,} steps = {steps * effective / rows:.2f} epochs",
        f"  learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value} schedule, device {args.device}",
    ]
    if resume_from:
        lines.append(f"  continuing the run at {resume_from}")
    return "\n".join(lines)
