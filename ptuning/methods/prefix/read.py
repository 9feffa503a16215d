"""Reads a prefix from a folder of ours, of the official trainer or of peft, and says what a folder without one is."""

import re
from pathlib import Path

import torch

from ptuning.checkpoint.manifest import read_manifest
from ptuning.checkpoint.tensors import TensorFiles, read_object, require_whole
from ptuning.errors import CheckpointError
from ptuning.methods.prefix.checkpoint import EMBEDDING, PrefixCheckpoint
from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.runs import RunFolder
from ptuning.runs.folder import MANIFEST

PREFIX = "prefix"  # of --method, and in manifests

EXPECTED = (
    "a folder with ptuning_config.json (this package), pytorch_model.bin holding transformer.prefix_encoder.* (official "
    "trainer) or adapter_config.json of type PREFIX_TUNING (peft)"
)


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
    if (folder / MANIFEST).is_file():
        return _read_own(folder)
    if (folder / _PEFT_CONFIG).is_file():
        return _read_peft(folder)
    tensors = TensorFiles.find(folder, CheckpointError) if folder.is_dir() else None
    if tensors is not None and any(_PREFIX_NAME.search(name) for name in tensors.files):
        stored = _prefix_tensors(tensors)
        return PrefixCheckpoint(folder, "official", stored, shape=_official_shape(folder / "config.json"))
    raise CheckpointError(f"{folder}: {_what_it_is(folder, tensors)} Expected {EXPECTED}.")


def _read_own(folder: Path) -> PrefixCheckpoint:
    path = folder / MANIFEST
    manifest = read_manifest(folder)
    assert manifest is not None  # its file is there
    if manifest.method != PREFIX:
        raise CheckpointError(f"{path}: method is {manifest.method!r}, so it is not a prefix. Expected {EXPECTED}.")
    if not manifest.file or Path(manifest.file).name != manifest.file:
        raise CheckpointError(f"{path}: file is {manifest.file!r}, expected the name of a file in the same folder.")
    file = folder / manifest.file
    require_whole(file, CheckpointError)
    manifest.require_same(file)
    stored = _prefix_tensors(TensorFiles.of_file(file, CheckpointError))
    base = manifest.base
    shape = PrefixShape(base.layers, base.groups, base.head_dim, base.hidden)
    checkpoint = PrefixCheckpoint(folder, "ptuning", stored, manifest, shape)
    found = (checkpoint.pre_seq_len, checkpoint.prefix_projection)
    said = tuple(manifest.settings.get(name) for name in ("pre_seq_len", "prefix_projection"))
    if found != said:
        raise CheckpointError(
            f"{path}: (pre_seq_len, prefix_projection) is {said} and the "
            f"tensors say {found}; one of the two files was changed."
        )
    return checkpoint


def _read_peft(folder: Path) -> PrefixCheckpoint:
    path = folder / _PEFT_CONFIG
    values = read_object(path, CheckpointError, "the checkpoint is damaged")
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
    values = read_object(path, CheckpointError, "the checkpoint is damaged")
    if "multi_query_group_num" not in values:
        return None  # a config that doesn't describe the base; the tensors' width is still checked
    names = ("num_layers", "multi_query_group_num", "kv_channels", "hidden_size")
    return PrefixShape(*(n if isinstance(n := values.get(name, 0), int) else 0 for name in names))


def _what_it_is(folder: Path, tensors: TensorFiles | None) -> str:
    """One or two sentences on a folder in which no prefix was found.

    Args:
        tensors: the weights in it, if any.
    """
    if folder.is_file():
        return f"is a file; give the folder it lies in, {folder.parent}."
    if not folder.is_dir():
        return f"no such folder (looked for {folder.absolute()})."
    checkpoints = RunFolder(folder).checkpoints()
    if checkpoints and tensors is None:
        return f"is the folder of a run, without a prefix of its own; its newest checkpoint is {checkpoints[-1]}: give that one."
    if any(folder.glob("prefix-*.safetensors")):
        return "looks like a save that was interrupted before ptuning_config.json was written; save again."
    if tensors is not None:
        layers = {name for name in tensors.files if ".layers." in name}
        if layers and any("lora_" in name for name in tensors.files):
            return "looks like a LoRA adapter, which is not a prefix."
        if layers:
            return (
                "looks like a base model or a checkpoint with all weights tuned: it has no prefix. Give it as "
                "model_name_or_path."
            )
        return f"has weights, but none of a prefix (found {', '.join(sorted(tensors.files)[:3]) or 'no tensor'})."
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is an empty folder."
    return f"has no weights (found {', '.join(names[:5])})."
