"""The contract for resuming: a resumed run is the run it continues, or it is refused."""

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ptuning.errors import ConfigError
from ptuning.messages import message
from ptuning.runs.files import read_json_if_possible
from ptuning.runs.folder import RECORD, TRAINER_STATE, RunFolder
from ptuning.runs.record import RunRecord

# Options that say nothing about what a run results in.
BESIDE_OPTIONS = (
    # where to and what for
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_eval", "do_predict"),
    # what is logged, saved and shown
    *("logging_*", "log_*", "report_to", "run_name", "project", "trackio_*", "disable_tqdm", "skip_memory_metrics"),
    *("save_*", "enable_jit_checkpoint", "push_to_hub*", "hub_*", "include_*"),
    # how rows reach the model, not which
    *("preprocessing_num_workers", "overwrite_cache"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("dataloader_multiprocessing_context",),
    # processes talking to each other
    *("local_rank", "ddp_timeout"),
)
# Options that may change, because no weight depends on them. Every other option is compared, also one that is yet to come.
FREE_OPTIONS = (
    *BESIDE_OPTIONS,
    # evaluation
    *("eval_*", "batch_eval_metrics", "prediction_loss_only", "*_full_eval", "per_device_eval_batch_size"),
    *("validation_file", "test_file", "max_eval_samples", "max_predict_samples", "val_max_target_length"),
    *("predict_with_generate", "generation_*", "num_beams", "baseline", "baseline_from", "probe"),
    *("engine", "vllm_*", "prefix_store", "device_map", "tensor_parallel"),
    # Compared as what they came to (RunRecord.kernels).
    *("kernels", "micro_batch_tokens"),
    # The checkpoint's own weights stand in the place of the prefix that the run began with.
    "ptuning_checkpoint",
)
# Compared together with the number of processes (ptuning.training.resume).
BATCH_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What a record without a word of its kernels means.
PLAIN_KERNELS: dict[str, Any] = {"kernels": "plain", "product": "torch", "micro_batch_tokens": 0, "gpu_loss": None}
# May go up: the run gets longer.
LENGTH_OPTIONS = ("max_steps", "num_train_epochs")
# Another spelling of the same path is no change.
PATH_OPTIONS = (
    "model_name_or_path",
    "ptuning_checkpoint",
    "train_file",
    "validation_file",
    "test_file",
    "dataset_name",
    "deepspeed",
    "mix",
)

_START_OPTIONS = ("pre_seq_len", "prefix_projection", "lora_rank", "lora_alpha", "lora_dropout", "lora_target")


def is_free(option: str) -> bool:
    """Whether an option may change when a run is resumed."""
    return any(fnmatchcase(option, pattern) for pattern in FREE_OPTIONS)


def is_beside(option: str) -> bool:
    """Whether an option says nothing about what a run results in."""
    return any(fnmatchcase(option, pattern) for pattern in BESIDE_OPTIONS)


def conflicts(before: RunRecord, now: RunRecord) -> list[str]:
    """What differs between a run and its continuation so that it would be another run: one line each, both values.

    Number of processes and BATCH_OPTIONS aren't looked at.
    """
    found = _weights_and_rows(before, now) + _kernels(before, now)
    for option in sorted(before.config.keys() & now.config.keys()):
        was, wish = before.config[option], now.config[option]
        if is_free(option) or option in BATCH_OPTIONS or _same(option, before, now):
            continue
        if option in _START_OPTIONS and before.config.get("ptuning_checkpoint") and not was:
            continue  # the length came from that checkpoint; reading this one's tensors holds the new value to it
        if option in LENGTH_OPTIONS:
            if not _is_longer(was, wish):
                found.append(f"{option} was {was!r}, now {wish!r} (it may only go up)")
            continue
        found.append(f"{option} was {was!r}, now {wish!r}" + (" with other contents" if was == wish else ""))
    return found


def notes(before: RunRecord, now: RunRecord) -> list[str]:
    """What the user should know of a continuation that has no conflicts."""
    said = []
    for option in LENGTH_OPTIONS:
        was, wish = before.config.get(option), now.config.get(option)
        counts = option == "max_steps" or not (now.config.get("max_steps") or 0) > 0
        if was != wish and counts and _is_longer(was, wish):
            schedule = now.config.get("lr_scheduler_type")
            said.append(message("longer_run", option=option, was=was, wish=wish, schedule=schedule))
    unknown = sorted(name for name in now.config.keys() - before.config.keys() if not is_free(name))
    if unknown:
        said.append(message("not_compared", options=", ".join(unknown)))
    return said


def _weights_and_rows(before: RunRecord, now: RunRecord) -> list[str]:
    found = []
    was, wish = before.base_fingerprint, now.base_fingerprint
    if None not in (was, wish) and was != wish:
        found.append(f"the base's weights have changed (fingerprint {was}, now {wish})")
    was, wish = before.rows_sha256, now.rows_sha256
    if None in (was, wish):  # an older record: only the file as a whole was hashed
        was, wish = before.data_sha256.get("train"), now.data_sha256.get("train")
    if was != wish:
        found.append(f"the training data has changed (sha256 {str(was)[:12]}…, now {str(wish)[:12]}…)")
    return found


_WHY = {
    "product": " (of the two libraries that multiply, which this machine has only one of)",
    "gpu_loss": " (what computes the loss on a GPU: liger-kernel has gone, or another device or --kernels plain has come)",
}


def _kernels(before: RunRecord, now: RunRecord) -> list[str]:
    found = []
    for name, plain in PLAIN_KERNELS.items():
        was, wish = (record.kernels.get(name, plain) for record in (before, now))
        if was != wish:
            found.append(f"{name} was {was!r}, now {wish!r}{_WHY.get(name, '')}")
    return found


def _same(option: str, before: RunRecord, now: RunRecord) -> bool:
    was, wish = before.config[option], now.config[option]
    if was == wish and option not in PATH_OPTIONS:
        return True
    if option == "deepspeed" and None not in (before.deepspeed_sha256, now.deepspeed_sha256):
        return before.deepspeed_sha256 == now.deepspeed_sha256
    if option in PATH_OPTIONS:
        return places(was, before.cwd) == places(wish, now.cwd)
    return False


def places(value: Any, cwd: str | None) -> Any:
    """Paths, also those in FILE:RATIO, as the places they lead to; other values as they are.

    Args:
        value: of one of PATH_OPTIONS.
        cwd: the directory that relative paths start from.
    """
    if isinstance(value, list):
        return [places(each, cwd) for each in value]
    if not isinstance(value, str):
        return value
    head, _, tail = value.rpartition(":")  # FILE:RATIO, or a path without a colon
    path, ratio = (head, tail) if head else (value, "")
    place = Path(cwd or os.curdir, Path(path).expanduser())
    if place.exists():
        return str(place.resolve()), ratio
    # Gone, or the name of a model on the hub.
    if cwd is not None and place.is_absolute() and place.is_relative_to(cwd):
        return os.path.normpath(place.relative_to(cwd)), ratio
    return os.path.normpath(path), ratio


def _is_longer(was: Any, wish: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in (was, wish))
    return numbers and wish > was


# --- the checkpoint ---------------------------------------------------------------------------------------------------------


def chosen_checkpoint(folder: RunFolder, wish: str | bool | None) -> Path | None:
    """What --resume_from_checkpoint means: a checkpoint of a run of this program, None for a new run.

    Args:
        folder: --output_dir, where `true` takes the latest.

    Raises:
        ConfigError: there is none, or it isn't one.
    """
    if wish is None or str(wish).lower() in ("false", "none", ""):
        return None
    if str(wish).lower() == "true":
        if not folder.checkpoints():
            raise ConfigError(f"--resume_from_checkpoint true: there is no checkpoint in {folder}")
        checkpoint = folder.checkpoints()[-1]
    else:
        checkpoint = Path(str(wish))
        if not (checkpoint / TRAINER_STATE).is_file():
            near = RunFolder(checkpoint).checkpoints()
            hint = f"; did you mean {near[-1]}?" if near else " (it needs trainer_state.json)"
            raise ConfigError(f"--resume_from_checkpoint {wish}: not a checkpoint of a run{hint}")
    if reason := _foreign(checkpoint):
        raise ConfigError(
            f"--resume_from_checkpoint {wish}: {checkpoint} was not written by this program ({reason}), so the run can't be "
            f"continued exactly; start a new run from it: {start_flag(checkpoint)}"
        )
    return checkpoint


def _foreign(checkpoint: Path) -> str | None:
    """Why a folder with trainer_state.json is no checkpoint of ours."""
    if (checkpoint / "pytorch_model.bin").exists():
        return "it has pytorch_model.bin"
    missing = [key for key in ("global_step", "max_steps", "log_history") if key not in _state(checkpoint)]
    if missing:
        return f"its {TRAINER_STATE} has no {', '.join(missing)}"
    if not (checkpoint.parent / RECORD).is_file():
        return f"there is no {checkpoint.parent / RECORD}"
    return None


def start_flag(checkpoint: Path) -> str:
    """The flag and value that begin a new run with a checkpoint's weights."""
    is_model = any(any(checkpoint.glob(name)) for name in ("model*.safetensors", "pytorch_model.bin.index.json"))
    return f"--{'model_name_or_path' if is_model else 'ptuning_checkpoint'} {checkpoint}"


def refusal(checkpoint: Path, differences: Sequence[str]) -> ConfigError:
    """The error for a continuation that would be another run."""
    return ConfigError(
        f"--resume_from_checkpoint {checkpoint} would not continue the same run: "
        + "; ".join(differences)
        + f". Use the old values, or start a new run from it: {start_flag(checkpoint)}"
    )


def is_finished(checkpoint: Path, planned_steps: int) -> bool:
    """Whether the run has taken all its steps, so that resuming would train beyond its end.

    Args:
        planned_steps: optimizer steps of the whole run.
    """
    step = _state(checkpoint).get("global_step")
    return isinstance(step, int) and step >= planned_steps


def _state(checkpoint: Path) -> Mapping[str, Any]:
    return read_json_if_possible(checkpoint / TRAINER_STATE)
