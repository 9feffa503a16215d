"""A model's folder under its own names in transformers, which vLLM loads right whatever the base; no tokenizer lies in it.

vLLM's class for the official names computes something else for some bases without a word: it ignores `kv_channels`, and takes
`rope_ratio` for another scaling. The tokenizer that it would make of the official one gives other ids, so the text stays on this
package's side.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ptuning.checkpoint.base import base_fingerprint
from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES, new_folder
from ptuning.checkpoint.shards import ShardWriter
from ptuning.families import family_of
from ptuning.runs.files import write_atomically

FORMAT = "vllm"
PREFIX_ROOM = 512  # positions beyond the base's own; a prefix takes some of vLLM's, and none of the base's context
FINGERPRINT = "ptuning_base"  # in config.json: of the base's weights


def save_native(model: PreTrainedModel, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Writes weights, configuration and generation configuration.

    Args:
        model: of `load_base`, in 16 or 32 bit, nothing attached.
        folder: new or empty.

    Raises:
        CheckpointError: the folder isn't empty.
        ModelError: the model's family has no form that other programs read.
    """
    return write_native(model, lambda: plain_tensors(model), folder, {}, max_shard_bytes)


def plain_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters as other programs need them: an output layer that multiplies by something else than what is stored is a
    plain one there."""
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        yield name, parameter if last == "bias" else getattr(model.get_submodule(layer), "effective_weight", parameter)


def write_native(
    model: PreTrainedModel,
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    folder: str | Path,
    more: Mapping[str, Any],
    max_shard_bytes: int,
) -> Path:
    """A folder in transformers' own form.

    Args:
        model: of `load_base`.
        tensors: gives what is written, one after the other; called twice, because shards are divided first.
        folder: new or empty.
        more: further entries of config.json.
        max_shard_bytes: of a file.

    Raises:
        CheckpointError: the folder isn't empty.
        ModelError: the model's family has no form that other programs read.
    """
    config = family_of(model.config).native_config(model.config)  # first: there may be no such form
    folder = new_folder(folder)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors()}
    writer = ShardWriter(folder, layout, max_shard_bytes)
    for name, tensor in tensors():
        writer.write(name, tensor)
    values = config.to_diff_dict() | {FINGERPRINT: base_fingerprint(model.config.name_or_path)} | dict(more)
    # Rotary positions are computed for each one anew, so that a larger number changes nothing but the limit.
    values["max_position_embeddings"] = config.max_position_embeddings + PREFIX_ROOM
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    model.generation_config.save_pretrained(folder)
    writer.finish()
    return folder
