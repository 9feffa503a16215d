"""Writes a prefix for other programs: the official ChatGLM2 code and peft."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ptuning.checkpoint.model_folder import new_folder
from ptuning.errors import ConfigError
from ptuning.families import family_of
from ptuning.methods.prefix.checkpoint import OFFICIAL_PREFIX, PrefixCheckpoint, for_base, materialise, rotate_rows
from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.methods.store import Stored, store_prefix
from ptuning.packages import require
from ptuning.runs.files import write_atomically


def export_official(checkpoint: PrefixCheckpoint, base_config: PreTrainedConfig, folder: str | Path) -> Path:
    """What the official trainer writes, for the official evaluation and demo code.

    `pytorch_model.bin` with the official names in fp32, and the base's config.json with `pre_seq_len` and
    `prefix_projection` added.

    Args:
        base_config: of the base the prefix belongs to.
        folder: new or empty.

    Raises:
        CheckpointError: the folder isn't empty, or the prefix belongs to another base.
        ConfigError: the base's official code reads no prefix.
    """
    if not (family := family_of(base_config)).prefix_in_official_code:
        raise ConfigError(f"--format official: the official code of {family.name} reads no prefix; use --format peft")
    raw, folder = for_base(checkpoint, base_config), new_folder(folder)
    config = family.config_values(base_config)
    config |= {"pre_seq_len": raw.pre_seq_len, "prefix_projection": raw.prefix_projection}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    state = {OFFICIAL_PREFIX + name: tensor.contiguous() for name, tensor in raw.tensors.items()}
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(folder / "pytorch_model.bin", lambda path: torch.save(state, path))
    return folder


def export_peft(
    checkpoint: PrefixCheckpoint, base_config: PreTrainedConfig, folder: str | Path, base_name: str | None = None
) -> Path:
    """A folder for `PeftModel.from_pretrained(base, folder)` that computes the same as the attached prefix.

    A projection is computed once and stored as a plain prefix. peft counts the positions of real tokens from T, so every
    key is rotated by +T. Left-padded rows are right too, because the model derives positions from the mask, which peft
    extends by the prefix.

    Args:
        base_config: of the base the prefix belongs to.
        folder: new or empty.
        base_name: written as `base_model_name_or_path`; default: the name in the checkpoint's manifest.

    Raises:
        CheckpointError: the folder isn't empty, or the prefix belongs to another base.
        ConfigError: peft isn't installed.
    """
    require("--format peft", "peft", "ptuning[peft]")
    from peft import PrefixTuningConfig, TaskType  # here, because nothing else in the package needs peft

    raw, folder, shape = for_base(checkpoint, base_config), new_folder(folder), PrefixShape.of(base_config)
    rows = rotate_rows(materialise(raw), raw.pre_seq_len, base_config).contiguous()
    if base_name is None and raw.manifest is not None:
        base_name = raw.manifest.base.name_or_path
    # peft's words for the cache's shape: `heads` are key/value groups, `token_dim` is what they have together.
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        inference_mode=True,
        num_virtual_tokens=raw.pre_seq_len,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_key_value_heads,
        token_dim=shape.num_key_value_heads * shape.head_dim,
        num_transformer_submodules=1,
        encoder_hidden_size=shape.num_key_value_heads * shape.head_dim,
        prefix_projection=False,
    )
    tensors = {"prompt_embeddings": rows}
    write_atomically(
        folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    config.save_pretrained(str(folder))
    return folder


def export_vllm(checkpoint: PrefixCheckpoint, base_config: PreTrainedConfig, store: Path) -> Stored:
    """A file in the folder that vLLM's workers read prefixes from (`ptuning_vllm`); a projection is computed once.

    Args:
        base_config: of the base the prefix belongs to.
        store: may hold others.

    Raises:
        CheckpointError: the prefix belongs to another base.
        OSError: it can't be written.
    """
    raw, shape = for_base(checkpoint, base_config), PrefixShape.of(base_config)
    rows_TW = rotate_rows(materialise(raw), raw.pre_seq_len, base_config)
    both_TLGD = rows_TW.view(-1, shape.num_layers, 2, shape.num_key_value_heads, shape.head_dim)
    keys_LTGD, values_LTGD = (both_TLGD[:, :, part].transpose(0, 1) for part in (0, 1))
    return store_prefix(keys_LTGD, values_LTGD, store)
