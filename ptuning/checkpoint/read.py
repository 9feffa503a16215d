"""Reads a prefix from a folder of ours, of the official trainer or of peft."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.checkpoint import description as own
from ptuning.checkpoint.diagnose import EXPECTED, what_it_is
from ptuning.checkpoint.prefix import EMBEDDING, PrefixCheckpoint
from ptuning.checkpoint.tensors import TensorFiles, require_whole
from ptuning.errors import CheckpointError
from ptuning.runs.files import sha256_of

# Wherever the prefix sits in the saved model, e.g. `transformer.prefix_encoder.embedding.weight`.
_PREFIX_NAME = re.compile(r"(?:^|\.)prefix_encoder\.(.+)$")
_PEFT_CONFIG = "adapter_config.json"
_PEFT_TENSOR = "prompt_embeddings"


def read_prefix(folder: str | Path) -> PrefixCheckpoint:
    """Reads a prefix checkpoint; length and projection are inferred from the tensors.

    Recognised are folders of `save_prefix`, of the official trainer (`pytorch_model.bin` or safetensors, whole or sharded,
    with `…prefix_encoder.…` among its tensors; config.json optional) and of peft's prefix tuning. No object other than a
    tensor is ever unpickled.

    Raises:
        CheckpointError: nothing of that, or damaged; the message says what the folder looks like.
    """
    folder = Path(folder).expanduser()
    if (folder / own.FILE).is_file():
        return _read_own(folder)
    if (folder / _PEFT_CONFIG).is_file():
        return _read_peft(folder)
    tensors = TensorFiles.find(folder, CheckpointError) if folder.is_dir() else None
    if tensors is not None and any(_PREFIX_NAME.search(name) for name in tensors.files):
        stored = _prefix_tensors(tensors)
        return PrefixCheckpoint(folder, "official", stored, shape=_official_shape(folder / "config.json"))
    raise CheckpointError(f"{folder}: {what_it_is(folder, tensors)} Expected {EXPECTED}.")


def _read_own(folder: Path) -> PrefixCheckpoint:
    path = folder / own.FILE
    description = own.PrefixDescription.from_json(path.read_text(encoding="utf-8"), path)
    if not description.file or Path(description.file).name != description.file:
        raise CheckpointError(f"{path}: file is {description.file!r}, expected the name of a file in the same folder.")
    file = folder / description.file
    require_whole(file, CheckpointError)
    sha256 = sha256_of(file)
    if sha256 != description.sha256:
        raise CheckpointError(
            f"{file}: damaged, its sha256 is {sha256[:16]}… and {own.FILE} says {description.sha256[:16]}…; copy the folder "
            "again."
        )
    stored = _prefix_tensors(TensorFiles.of_file(file, CheckpointError))
    checkpoint = PrefixCheckpoint(folder, "ptuning", stored, description, description.base.shape)
    found = (checkpoint.pre_seq_len, checkpoint.prefix_projection)
    if found != (description.pre_seq_len, description.prefix_projection):
        raise CheckpointError(
            f"{path}: (pre_seq_len, prefix_projection) is {(description.pre_seq_len, description.prefix_projection)} and the "
            f"tensors say {found}; one of the two files was changed."
        )
    return checkpoint


def _read_peft(folder: Path) -> PrefixCheckpoint:
    path = folder / _PEFT_CONFIG
    values = _read_json(path)
    if values.get("peft_type") != "PREFIX_TUNING":
        raise CheckpointError(
            f"{folder}: looks like a peft adapter of type {values.get('peft_type')!r}, which is not a prefix. Expected {EXPECTED}."
        )
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: {files[0].name} is missing; copy the whole folder.")
    tensors = TensorFiles.of_file(file, CheckpointError)
    name = next((name for name in tensors.files if name.split(".")[-1] == _PEFT_TENSOR), None)
    if name is None:
        raise CheckpointError(f"{file}: has no tensor {_PEFT_TENSOR}, found {', '.join(sorted(tensors.files)[:5])}.")
    rows = tensors.read(name).float()
    try:
        layers, heads, width = (int(values[k]) for k in ("num_layers", "num_attention_heads", "token_dim"))
        shape = PrefixShape(layers, heads, width // heads, 0)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
        raise CheckpointError(
            f"{path}: num_layers, num_attention_heads and token_dim must be numbers ({cause!r})."
        ) from cause
    return PrefixCheckpoint(folder, "peft", {EMBEDDING: rows}, shape=shape, key_position=rows.shape[0])


def _prefix_tensors(tensors: TensorFiles) -> dict[str, torch.Tensor]:
    matches = {name: _PREFIX_NAME.search(name) for name in tensors.files}
    return {match.group(1): tensors.read(name).float() for name, match in matches.items() if match}


def _official_shape(path: Path) -> PrefixShape | None:
    if not path.is_file():
        return None
    values = _read_json(path)
    if "multi_query_group_num" not in values:
        return None  # a config that doesn't describe the base; the tensors' width is still checked
    names = ("num_layers", "multi_query_group_num", "kv_channels", "hidden_size")
    return PrefixShape(*(n if isinstance(n := values.get(name, 0), int) else 0 for name in names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise CheckpointError(f"{path}: not valid JSON ({cause}); the checkpoint is damaged.") from cause
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected an object.")
    return values
