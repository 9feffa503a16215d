"""Whether a run can go on from a checkpoint: the contract of ptuning.runs.resume, and what processes and DeepSpeed add to it."""

from pathlib import Path

from ptuning.checkpoint.zero_files import UNIVERSAL
from ptuning.config import TuningArguments
from ptuning.runs import RunFolder, RunRecord
from ptuning.runs.folder import step_of
from ptuning.runs.resume import BATCH_OPTIONS, chosen_checkpoint, conflicts, notes, refusal


def require_same_run(checkpoint: Path, now: RunRecord, training: TuningArguments) -> list[str]:
    """Holds that training on from a checkpoint is the run that wrote it.

    Args:
        checkpoint: from `ptuning.runs.resume.chosen_checkpoint`.
        now: the record of this run.
        training: its options; told to read converted DeepSpeed files where those are needed.

    Returns:
        Notes for the user.

    Raises:
        ConfigError: it would be another run; the message names every difference.
        DataError: the record of the run can't be read.
    """
    before = record_of(checkpoint)
    found = deepspeed_conflicts(checkpoint, training) + conflicts(before, now)
    found += batch_conflicts(before.config, now.config, (before.world_size, now.world_size), checkpoint)
    if found:
        raise refusal(checkpoint, found)
    load_universal(checkpoint, training)
    return notes(before, now)


def record_of(checkpoint: Path) -> RunRecord:
    """The record of the run that wrote a checkpoint. Raises DataError where it can't be read."""
    return RunFolder(checkpoint.parent).record_at(step_of(checkpoint) or 0) or RunRecord()


def run_to_continue(training: TuningArguments) -> RunRecord | None:
    """The record of the run that this one goes on with; None for a new run.

    Raises:
        ConfigError: there is nothing to resume.
        DataError: the record can't be read.
    """
    checkpoint = chosen_checkpoint(RunFolder(training.output_dir), training.resume_from_checkpoint)
    return None if checkpoint is None else record_of(checkpoint)


def deepspeed_conflicts(checkpoint: Path, training: TuningArguments) -> list[str]:
    """What of the checkpoint's files the configuration can't read: one line each, with the way out.

    Args:
        checkpoint: an existing `checkpoint-N`.
    """
    files = [path.name for path in checkpoint.glob("global_step*/*_model_states.pt")]
    if not files:
        if training.deepspeed:
            return ["the checkpoint was written without DeepSpeed, now --deepspeed is given; leave it out"]
        return []
    was = 3 if any(name.startswith("zero_pp_rank") for name in files) else 2
    if not training.deepspeed:
        return [
            f"the checkpoint was written by DeepSpeed ZeRO-{was}; give the --deepspeed file again, e.g. configs/zero{was}.json"
        ]
    now = 3 if training.hf_deepspeed_config.is_zero3() else 2
    if was != now:
        return [
            f"the checkpoint was written by ZeRO-{was}, and {training.deepspeed} is stage {now}; give one of stage {was}"
        ]
    return []


def batch_conflicts(before: dict, now: dict, processes: tuple[int, int], checkpoint: Path) -> list[str]:
    """What about processes and batch would make the resumed run see other rows, or can't be read.

    Args:
        before: the run's options.
        now: the options given.
        processes: (then, now).
        checkpoint: its DeepSpeed files may have been converted for other numbers of processes.
    """
    if processes[0] == processes[1]:
        return [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in BATCH_OPTIONS
            if before.get(key) != now.get(key)
        ]
    changed = f"the number of processes was {processes[0]}, now {processes[1]}"
    if not any(checkpoint.glob("global_step*")):
        return [changed]
    if not (checkpoint / UNIVERSAL).is_file():
        return [f"{changed} (to change it, convert the checkpoint once: ptuning convert --checkpoint {checkpoint})"]
    if now.get("tokens_per_batch") is not None:
        return [f"{changed}, which decides the batches of --tokens_per_batch; start {processes[0]} again"]
    rows = [config[BATCH_OPTIONS[0]] * number for config, number in zip((before, now), processes, strict=True)]
    effective = [count * config[BATCH_OPTIONS[1]] for count, config in zip(rows, (before, now), strict=True)]
    if effective[0] != effective[1]:
        return [
            f"{changed}, and rows × accumulation steps × processes was {effective[0]}, now {effective[1]}; keep it the same with "
            "--per_device_train_batch_size and --gradient_accumulation_steps"
        ]
    if rows[0] != rows[1] and now["train_sampling_strategy"] == "group_by_length":
        return [
            f"{changed}, and rows × processes was {rows[0]}, now {rows[1]}, which decides the order of rows with "
            "--train_sampling_strategy group_by_length; change --per_device_train_batch_size"
        ]
    return []


def load_universal(checkpoint: Path, training: TuningArguments) -> None:
    """Makes DeepSpeed read the converted files where this number of processes didn't write the others."""
    if training.deepspeed and training.world_size != len(list(checkpoint.glob("global_step*/*_optim_states.pt"))):
        training.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True
