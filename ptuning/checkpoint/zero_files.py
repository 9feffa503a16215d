"""DeepSpeed's own checkpoint files (`global_stepN/zero_pp_rank_*`): read without running what they contain, merged offline."""

import contextlib
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ptuning.checkpoint.base import check_tokenizer, require_16_bit
from ptuning.checkpoint.manifest import read_manifest
from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES, file_layout, require_new, write_rest
from ptuning.checkpoint.shards import ShardWriter, total_bytes
from ptuning.distributed import choose_deepspeed_device
from ptuning.errors import CheckpointError, ModelError
from ptuning.families import family_of, read_config
from ptuning.packages import require

UNIVERSAL = "latest_universal"  # DeepSpeed's name for the file that names the converted folder

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def known_objects_only() -> Iterator[None]:
    """Inside, every torch.load, DeepSpeed's too, reads tensors, plain values and four plain classes of DeepSpeed.

    Raises:
        CheckpointError: a file holds something else, which could run code.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as cause:
        raise CheckpointError(
            f"the DeepSpeed checkpoint holds other objects than tensors and plain values, which are not loaded because they "
            f"could run code ({_which(cause)}). Use a checkpoint that was written by this program."
        ) from cause
    finally:
        if before is None:
            os.environ.pop(_FORCE)
        else:
            os.environ[_FORCE] = before


def _which(cause: Exception) -> str:
    """The line of torch's long message that names the object."""
    lines = str(cause).splitlines()
    return next((line.strip() for line in lines if "GLOBAL" in line), lines[0])


def zero_folder(checkpoint: Path) -> Path:
    """The folder `global_stepN` of a run's checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    latest = checkpoint / "latest"
    folder = checkpoint / latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    if folder is None or folder.parent != checkpoint or not any(folder.glob("*optim_states.pt")):
        raise CheckpointError(
            f"{checkpoint}: not a DeepSpeed checkpoint (no file `latest` that names a folder with *_optim_states.pt). Give a "
            "checkpoint-N folder of a run with --deepspeed."
        )
    return folder


def merge_zero(
    checkpoint: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Makes an official model folder of a ZeRO checkpoint's fp32 master weights, without GPUs or a process group.

    The files are mapped, not read: under stage 3 one tensor is in memory at a time.

    Args:
        checkpoint: `checkpoint-N` of a run with --deepspeed.
        output: new or empty.
        base: where config.json and the tokenizer are taken from; default: the checkpoint itself.
        dtype: of the written weights.

    Raises:
        CheckpointError: not such a checkpoint, of a prefix alone, damaged, or `output` isn't empty.
        ModelError: `base` has no usable config.json or tokenizer.model.
        ConfigError: DeepSpeed isn't installed.
    """
    require("a DeepSpeed checkpoint", "deepspeed", "ptuning[full]")
    choose_deepspeed_device()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint, output = Path(checkpoint), Path(output)
    zero_folder(checkpoint)
    base = checkpoint if base is None else Path(base)
    try:
        require_16_bit(base, "a checkpoint of all weights can't be merged into quantised ones")
        check_tokenizer(base)
    except ModelError as cause:
        raise ModelError(f"{cause} Or give the base it was trained from as --model_name_or_path.") from cause
    require_new(output)
    config = read_config(base)
    family = family_of(config)
    with known_objects_only():
        try:
            merged = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
        except (ValueError, RuntimeError, OSError, KeyError, FileNotFoundError) as cause:
            raise CheckpointError(f"{checkpoint}: can't be merged ({cause}).") from cause
        plan = family.weight_sources(merged)
        if family.embedding not in plan:
            raise CheckpointError(f"{checkpoint}: holds a prefix, not a whole model; it is already usable as it is.")
        layout = file_layout({name: (tensor.shape, dtype) for name, tensor in merged.items()}, config, dtype)
        needed = total_bytes(layout)
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free
        if free < needed:
            raise CheckpointError(f"{output}: needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free.")
        writer = ShardWriter(output, layout, max_shard_bytes)
        for name, sources in plan.items():
            writer.write(name, torch.cat([merged[source].contiguous() for source in sources]).to(dtype))
            if name == family.embedding:
                for key, tensor in family.extra_tensors(config).items():
                    writer.write(key, tensor.to(dtype))
    write_rest(base, output, config, dtype)
    manifest = read_manifest(checkpoint)  # not the base's, which may be a tuned model itself
    if manifest is not None:
        manifest.write(output)
    writer.finish()
    return output


def convert_to_universal(checkpoint: str | Path) -> Path:
    """Rewrites a checkpoint's DeepSpeed files so that another number of processes can resume from them.

    Args:
        checkpoint: `checkpoint-N` of a run with --deepspeed; the universal files are put beside the old ones.

    Raises:
        CheckpointError: not such a checkpoint, or it holds unknown objects.
        ConfigError: DeepSpeed isn't installed.
    """
    require("a DeepSpeed checkpoint", "deepspeed", "ptuning[full]")
    choose_deepspeed_device()
    from deepspeed.checkpoint import ds_to_universal

    checkpoint = Path(checkpoint)
    source = zero_folder(checkpoint)
    target = checkpoint / f"{source.name}_universal"
    shutil.rmtree(target, ignore_errors=True)
    arguments = ["--input_folder", str(source), "--output_folder", str(target)]
    with known_objects_only(), _argv(arguments):
        ds_to_universal.main(ds_to_universal.parse_arguments())
    (checkpoint / UNIVERSAL).write_text(target.name, encoding="utf-8")
    return target


@contextlib.contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = (
        sys.argv,
        ["ds_to_universal", *arguments, "--num_extract_workers", "1", "--num_merge_workers", "1"],
    )
    try:
        yield
    finally:
        sys.argv = before
