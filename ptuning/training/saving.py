"""Writes the model in training as a complete official folder: streamed, checked for space first, all processes together."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.checkpoint.full import FullDescription, official_layout, official_tensors, write_beside
from ptuning.checkpoint.partitioned import whole_shape
from ptuning.checkpoint.shards import ShardWriter, total_bytes
from ptuning.distributed import raise_together

MAX_SHARD_BYTES = 2 * 10**9

_SPARE = 64 * 2**20  # tokenizer, logs, file system overhead
_STATE_BYTES = {True: 12, False: 8}  # a trainable parameter: fp32 moments, and with DeepSpeed the fp32 master weight


def save_full_model(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    description: FullDescription | None,
    folder: Path,
    *,
    writes: bool,
    device: torch.device,
    step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Saves weights, configuration, tokenizer, generation configuration and description.

    All processes call it, those that don't write too: under ZeRO-3 each tensor is gathered from all of them. The writer
    never holds more than one gathered tensor beside its own share. A model that was in the folder before stays whole until
    the new one's index replaces the old one's.

    Args:
        writes: whether this process writes.
        device: where the process group reduces.
        step: of the optimizer, for the description.

    Raises:
        TrainingError: the folder can't be written; on all processes.
    """
    parameters, problem, writer = dict(model.named_parameters()), None, None
    try:
        if writes:
            layout = official_layout(parameters, model.config)
            writer = ShardWriter(folder, layout, max_shard_bytes, tag=_tag(folder))
    except OSError as cause:
        problem = _cannot_write(folder, cause)
    raise_together(problem, device)
    for name, tensor in official_tensors(parameters, model.config):
        try:
            if writer is not None and problem is None:
                writer.write(name, tensor)
        except OSError as cause:
            problem = _cannot_write(folder, cause)  # the others wait in the next gather, so this goes on to the end
    try:
        if writer is not None and problem is None:
            tokenizer.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            about = None if description is None else replace(description, step=step)
            write_beside(folder, model.config, next(iter(parameters.values())).dtype, about)
            writer.finish()
    except OSError as cause:
        problem = _cannot_write(folder, cause)
    raise_together(problem, device)


def require_space(
    folder: Path, model: nn.Module, *, optimizer: bool, deepspeed: bool, device: torch.device, checks: bool
) -> None:
    """Refuses to begin a checkpoint that can't be finished.

    Args:
        optimizer: whether its state is saved too.
        deepspeed: its checkpoints also hold fp32 master weights.
        checks: whether this process writes and so looks.

    Raises:
        TrainingError: not enough free disk; on all processes, with what is needed and what is free.
    """
    problem = None
    if checks:
        needed = _SPARE + _model_bytes(model)
        if optimizer:
            trainable = sum(whole_shape(p).numel() for p in model.parameters() if p.requires_grad)
            needed += trainable * _STATE_BYTES[deepspeed]
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            problem = (
                f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free. Nothing was "
                "written, earlier checkpoints are whole. Free some space, lower --save_total_limit, or give --save_only_model "
                "true (no optimizer state, can't be resumed), then continue with --resume_from_checkpoint true."
            )
    raise_together(problem, device)


def _model_bytes(model: nn.Module) -> int:
    return total_bytes(official_layout(dict(model.named_parameters()), model.config))


def _tag(folder: Path) -> str:
    """Empty in a fresh folder; elsewhere something new, so that the older model's files aren't touched."""
    return uuid.uuid4().hex[:8] if any(folder.glob("model*.safetensors*")) else ""


def _cannot_write(folder: Path, cause: OSError) -> str:
    return f"{folder}: the model can't be written ({cause}). Earlier checkpoints are whole."
