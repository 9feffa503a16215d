"""A base model's fingerprint, from its files: says whether a prefix belongs to this base, in milliseconds."""

import hashlib
from pathlib import Path

import torch

from ptuning.checkpoint.base_folder import EMBEDDING, resolve_base
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import ModelError

ROWS = 256  # read of each large matrix, spread evenly
DIGITS = 16

_OUTPUT = "transformer.output_layer.weight"
_LAYER = "transformer.encoder.layers."
_BIAS = ".self_attention.query_key_value.bias"


def base_fingerprint(model_dir: str | Path) -> str:
    """16 hex digits that agree for copies of the same weights and differ for other weights.

    Hashed are the signs of 256 rows of the embedding and of the output layer, of the query/key/value biases of the first
    and last layer, and their shapes. A sign survives every rounding (also to zero, which keeps its sign bit), so fp32,
    fp16 and bf16 copies agree; rounded values would not, because fp32 → fp16 → bf16 and fp32 → bf16 differ in one number
    of 16. Official int8 and int4 checkpoints keep these tensors in 16 bit and so agree with their 16-bit original. Any
    training of all weights flips some of the two million signs; merging a LoRA into the attention alone does not show.

    Args:
        model_dir: folder in the official format, or a hub id that is in the local cache.

    Raises:
        ModelError: no such folder, or no weights in the official format there.
    """
    folder = resolve_base(model_dir)
    tensors = TensorFiles.find(folder, ModelError)
    if tensors is None or EMBEDDING not in tensors.files:
        raise ModelError(f"{folder}: no fingerprint can be computed, {EMBEDDING} was not found.")
    digest = hashlib.sha256()
    for name in _names(tensors):
        shape = tensors.shape(name)
        part = tensors.read(name) if len(shape) == 1 else tensors.read_rows(name, _spread(shape[0]))
        digest.update(f"{name}{shape}".encode())
        digest.update(_pack_signs(part))
    return digest.hexdigest()[:DIGITS]


def _names(tensors: TensorFiles) -> list[str]:
    layers = {int(name[len(_LAYER) :].split(".")[0]) for name in tensors.files if name.startswith(_LAYER)}
    ends = [f"{_LAYER}{layer}{_BIAS}" for layer in sorted({min(layers), max(layers)})] if layers else []
    # A tied output layer or absent biases are no reason to fail.
    return [EMBEDDING, *(name for name in (_OUTPUT, *ends) if name in tensors.files)]


def _spread(length: int) -> list[int]:
    return sorted({i * length // ROWS for i in range(ROWS)})


def _pack_signs(tensor: torch.Tensor) -> bytes:
    bits = torch.signbit(tensor.float()).flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return bytes((bits * weights).sum(-1, dtype=torch.uint8).tolist())
