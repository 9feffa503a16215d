"""A prefix as it was read from a folder, whichever program wrote it, and what turns it into keys for a given base.

Shapes: T = pre_seq_len, L = layers, G = key/value groups, D = head dimension.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.methods.prefix.encoder import PrefixShape, rotate_keys
from ptuning.checkpoint.description import PrefixDescription
from ptuning.errors import CheckpointError

OFFICIAL_PREFIX = "transformer.prefix_encoder."
EMBEDDING = "embedding.weight"
PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")

Kind = Literal["ptuning", "official", "peft"]


@dataclass(frozen=True)
class PrefixCheckpoint:
    """Tensors of a prefix, with what the folder says about it.

    Args:
        folder: where it was read.
        kind: which program's format.
        stored: tensors by short name (`embedding.weight` (T, L·2·G·D), `trans.0.weight`, …), fp32, as in the file.
        description: None in folders of other programs.
        shape: the base's numbers as far as the folder tells them; a number it doesn't tell is 0.
        key_position: position by which the stored keys are rotated; 0 = raw, as everywhere but in peft's folders.

    Raises:
        CheckpointError: the tensors aren't those of a prefix, don't fit together or aren't finite.
    """

    folder: Path
    kind: Kind
    stored: dict[str, torch.Tensor]
    description: PrefixDescription | None = None
    shape: PrefixShape | None = None
    key_position: int = 0

    def __post_init__(self):
        _check(self.stored, self.folder)

    @property
    def pre_seq_len(self) -> int:
        return self.stored[EMBEDDING].shape[0]

    @property
    def prefix_projection(self) -> bool:
        return len(self.stored) > 1

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What `PrefixEncoder.load_state_dict` takes.

        Raises:
            CheckpointError: a peft folder, whose keys are rotated; use `for_base(checkpoint, config).tensors`.
        """
        if self.key_position:
            raise CheckpointError(
                f"{self.folder}: peft stores keys rotated to position {self.key_position}; use for_base(checkpoint, "
                "base_config), which rotates them back."
            )
        return self.stored


def for_base(checkpoint: PrefixCheckpoint, config: ChatGLMConfig) -> PrefixCheckpoint:
    """The same prefix with raw keys, checked against the base it is meant for.

    Args:
        config: of the base; its rotary frequencies turn peft's keys back.

    Raises:
        CheckpointError: the prefix has another shape than the base needs.
    """
    _check_shape(checkpoint, PrefixShape.of(config))
    if not checkpoint.key_position:
        return checkpoint
    rows = rotate_rows(checkpoint.stored[EMBEDDING], -checkpoint.key_position, config)
    return replace(checkpoint, stored={EMBEDDING: rows}, key_position=0)


def materialise(checkpoint: PrefixCheckpoint) -> torch.Tensor:
    """The prefix as one matrix (T, L·2·G·D) with raw keys; a projection is computed once and gone."""
    tensors = checkpoint.tensors
    if not checkpoint.prefix_projection:
        return tensors[EMBEDDING]
    weight_0, bias_0, weight_2, bias_2 = (tensors[name] for name in PROJECTION)
    hidden = torch.tanh(nn.functional.linear(tensors[EMBEDDING], weight_0, bias_0))
    return nn.functional.linear(hidden, weight_2, bias_2)


def rotate_rows(rows_TW: torch.Tensor, offset: int, config: ChatGLMConfig) -> torch.Tensor:
    """Rotates the keys in (T, L·2·G·D) by `offset` positions with the base's frequencies; values stay."""
    shape = PrefixShape.of(config)
    kv = rows_TW.view(len(rows_TW), shape.num_layers, 2, shape.num_key_value_heads, shape.head_dim)
    keys = rotate_keys(kv[:, :, 0], offset, GlmRotaryEmbedding(config).inv_freq)
    return torch.stack((keys, kv[:, :, 1]), dim=2).reshape(rows_TW.shape)


def _check(stored: dict[str, torch.Tensor], folder: Path) -> None:
    names = set(stored)
    if names not in ({EMBEDDING}, {EMBEDDING, *PROJECTION}):
        missing = sorted({EMBEDDING, *(PROJECTION if len(names) > 1 else ())} - names)
        extra = sorted(names - {EMBEDDING, *PROJECTION})
        raise CheckpointError(
            f"{folder}: the prefix's tensors are incomplete or unknown (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(extra) or 'none'}); expected {EMBEDDING}, with projection also {', '.join(PROJECTION)}."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    width = shapes[EMBEDDING][-1]
    expected = {EMBEDDING: (shapes[EMBEDDING][0], width)}
    if len(names) > 1:
        hidden = shapes["trans.0.weight"][0]
        expected |= zip(PROJECTION, ((hidden, width), (hidden,), (width, hidden), (width,)), strict=True)
    for name, shape in shapes.items():
        if shape != expected[name] or 0 in shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {shape}, expected {expected[name]}; the file is damaged."
            )
    for name, tensor in stored.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{folder}: {name} has {bad} of {tensor.numel()} numbers that are NaN or infinite: the run had diverged. Use an "
                "earlier checkpoint, or train again with a lower learning rate."
            )


def _check_shape(checkpoint: PrefixCheckpoint, base: PrefixShape) -> None:
    told = checkpoint.shape
    differing = []
    if told is not None:
        for name in ("num_layers", "num_key_value_heads", "head_dim", "hidden_size"):
            ours, theirs = getattr(told, name), getattr(base, name)
            if ours and ours != theirs:
                differing.append(f"{name} {ours} in the checkpoint, {theirs} in the base")
    width = checkpoint.stored[EMBEDDING].shape[1]
    if width != base.width:
        differing.append(f"{width} numbers a position in the checkpoint, {base.width} in the base")
    if checkpoint.prefix_projection and checkpoint.stored["trans.0.bias"].numel() != base.hidden_size:
        hidden = checkpoint.stored["trans.0.bias"].numel()
        differing.append(f"projection of width {hidden} in the checkpoint, hidden size {base.hidden_size} in the base")
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder}: this prefix belongs to another base model ({'; '.join(differing)}). Give the base it was "
            f"trained on{_named(checkpoint)}."
        )


def _named(checkpoint: PrefixCheckpoint) -> str:
    return f", {checkpoint.description.base.name_or_path}" if checkpoint.description else ""
