"""A prefix in a folder: what was read, whichever program wrote it, what turns it into keys for a given base, and saving.

Shapes: T = pre_seq_len, L = layers, G = key/value groups, D = head dimension.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from ptuning.checkpoint.finite import refuse_diverged
from ptuning.checkpoint.manifest import Manifest
from ptuning.errors import CheckpointError
from ptuning.families import family_of
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
from ptuning.runs.files import TEMPORARY, publish, sha256_of, temporary_in

TENSOR_FILES = "prefix-*.safetensors"
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
        manifest: None in folders of other programs.
        shape: the base's numbers as far as the folder tells them; a number it doesn't tell is 0.
        key_position: position by which the stored keys are rotated; 0 = raw, as everywhere but in peft's folders.

    Raises:
        CheckpointError: the tensors aren't those of a prefix, don't fit together or aren't finite.
    """

    folder: Path
    kind: Kind
    stored: dict[str, torch.Tensor]
    manifest: Manifest | None = None
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


def for_base(checkpoint: PrefixCheckpoint, config: PreTrainedConfig) -> PrefixCheckpoint:
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


def rotate_rows(rows_TW: torch.Tensor, offset: int, config: PreTrainedConfig) -> torch.Tensor:
    """Rotates the keys in (T, L·2·G·D) by `offset` positions with the base's frequencies; values stay."""
    shape = PrefixShape.of(config)
    kv = rows_TW.view(len(rows_TW), shape.num_layers, 2, shape.num_key_value_heads, shape.head_dim)
    keys = family_of(config).rotate_keys(kv[:, :, 0], offset, config)
    return torch.stack((keys, kv[:, :, 1]), dim=2).reshape(rows_TW.shape)


def save_prefix(
    folder: str | Path,
    tensors_or_encoder: dict[str, torch.Tensor] | PrefixEncoder,
    manifest: Manifest,
) -> Path:
    """Saves into `folder`, which may hold other files and an older prefix.

    The tensors (official names, fp32) go to `prefix-<start of their sha256>.safetensors`, so a new prefix never touches the
    old one's file. Then `ptuning_config.json`, which names that file and its whole sha256, is replaced in one step: that is
    the moment the new checkpoint becomes valid. Then older prefix files are deleted. A pair of old and new is impossible;
    the worst a kill leaves is a file that nothing refers to, which the next save into the folder deletes.

    Args:
        tensors_or_encoder: by short name (`embedding.weight`, `trans.0.weight`, …), or the encoder itself (its parameters
            must be whole: under ZeRO-3 inside GatheredParameters).

    Returns:
        The folder.

    Raises:
        CheckpointError: the tensors contradict the manifest, or the folder can't be written.
    """
    folder = Path(folder)
    tensors = tensors_or_encoder.state_dict() if isinstance(tensors_or_encoder, PrefixEncoder) else tensors_or_encoder
    _check_agreement(tensors, manifest, folder)
    named = {OFFICIAL_PREFIX + k: t.detach().to("cpu", torch.float32).contiguous() for k, t in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = temporary_in(folder)
        save_file(named, written, metadata={"format": "pt"})
        sha256 = sha256_of(written)
        target = folder / TENSOR_FILES.replace("*", sha256[:8])
        publish(written, target)
        replace(manifest, file=target.name, sha256=sha256).write(folder)
        for old in [*folder.glob(TENSOR_FILES), *folder.glob(TEMPORARY)]:
            if old != target:
                old.unlink(missing_ok=True)
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: the prefix can't be written ({cause}). What was saved there before is intact."
        ) from cause
    return folder


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
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (shapes[EMBEDDING][0], width)}
    if len(names) > 1:
        hidden = shapes["trans.0.weight"][0]
        expected |= zip(PROJECTION, ((hidden, width), (hidden,), (width, hidden), (width,)), strict=True)
    for name, shape in shapes.items():
        if shape != expected[name] or 0 in shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {shape}, expected {expected[name]}; the file is damaged."
            )
    refuse_diverged(stored, folder)


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
    return f", {checkpoint.manifest.base.name_or_path}" if checkpoint.manifest else ""


def _check_agreement(tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path) -> None:
    checkpoint = PrefixCheckpoint(folder, "ptuning", tensors)  # refuses what is not a finite prefix
    found = (*tensors[EMBEDDING].shape, checkpoint.prefix_projection)
    base, settings = manifest.base, manifest.settings
    width = PrefixShape(base.layers, base.groups, base.head_dim, base.hidden).width
    expected = (settings.get("pre_seq_len"), width, settings.get("prefix_projection"))
    if found != expected:
        raise CheckpointError(
            f"{folder}: tensors and manifest disagree: (pre_seq_len, width, prefix_projection) is {found} in the tensors, "
            f"{expected} in the manifest."
        )
