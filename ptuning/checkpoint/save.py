"""Writes a prefix checkpoint so that a kill at any moment leaves the old one or the new one, whole."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptuning.methods.prefix.encoder import PrefixEncoder
from ptuning.checkpoint.description import FILE, PrefixDescription
from ptuning.checkpoint.prefix import EMBEDDING, OFFICIAL_PREFIX, PrefixCheckpoint
from ptuning.errors import CheckpointError
from ptuning.runs.files import TEMPORARY, publish, sha256_of, temporary_in, write_text

TENSOR_FILES = "prefix-*.safetensors"


def save_prefix(
    folder: str | Path,
    tensors_or_encoder: dict[str, torch.Tensor] | PrefixEncoder,
    description: PrefixDescription,
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
        CheckpointError: the tensors contradict the description, or the folder can't be written.
    """
    folder = Path(folder)
    tensors = tensors_or_encoder.state_dict() if isinstance(tensors_or_encoder, PrefixEncoder) else tensors_or_encoder
    _check(tensors, description, folder)
    named = {OFFICIAL_PREFIX + k: t.detach().to("cpu", torch.float32).contiguous() for k, t in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = temporary_in(folder)
        save_file(named, written, metadata={"format": "pt"})
        sha256 = sha256_of(written)
        target = folder / TENSOR_FILES.replace("*", sha256[:8])
        publish(written, target)
        text = replace(description, file=target.name, sha256=sha256).to_json()
        write_text(folder / FILE, text)
        for old in [*folder.glob(TENSOR_FILES), *folder.glob(TEMPORARY)]:
            if old != target:
                old.unlink(missing_ok=True)
    except OSError as cause:
        raise CheckpointError(
            f"{folder}: the prefix can't be written ({cause}). What was saved there before is intact."
        ) from cause
    return folder


def _check(tensors: dict[str, torch.Tensor], description: PrefixDescription, folder: Path) -> None:
    checkpoint = PrefixCheckpoint(folder, "ptuning", tensors)  # refuses what is not a finite prefix
    found = (*tensors[EMBEDDING].shape, checkpoint.prefix_projection)
    expected = (description.pre_seq_len, description.base.shape.width, description.prefix_projection)
    if found != expected:
        raise CheckpointError(
            f"{folder}: tensors and description disagree: (pre_seq_len, width, prefix_projection) is {found} in the tensors, "
            f"{expected} in the description."
        )
