"""Writes a model as safetensors shards, tensor by tensor: what is in memory at any moment is one tensor.

safetensors' own `save_file` wants a whole shard in memory, and under ZeRO-3 even that is the second copy. The format is
simple: 8 bytes of length, a JSON header, the bytes (https://huggingface.co/docs/safetensors).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ptuning.checkpoint.tensors import DTYPES
from ptuning.runs.files import write_atomically

INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"

# Tensor name → shape and dtype, in the order of writing.
TensorLayout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def total_bytes(layout: TensorLayout) -> int:
    return sum(_bytes(*entry) for entry in layout.values())


class ShardWriter:
    """Writes the tensors of `layout`, in its order, then the index. The folder is a valid model once `finish` has returned.

    Args:
        folder: may hold an older model, which stays whole until the index is replaced and is then deleted.
        layout: name → shape and dtype of every tensor.
        max_shard_bytes: a shard ends before it would be larger; a larger tensor has a shard of its own.
        tag: part of the shards' names, so that a new model doesn't touch an older one's files in the same folder.
    """

    def __init__(self, folder: Path, layout: TensorLayout, max_shard_bytes: int, tag: str = ""):
        self.folder = folder
        self._layout = layout
        self._shards = _divide(layout, max_shard_bytes)
        middle = f"{tag}-" if tag else ""
        self._files = [
            f"model-{middle}{i + 1:05d}-of-{len(self._shards):05d}.safetensors" for i in range(len(self._shards))
        ]
        self._pending = [(name, number) for number, names in enumerate(self._shards) for name in names]
        self._open: tuple[int, BinaryIO] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends the next tensor.

        Args:
            tensor: on any device; of the layout's shape and dtype.

        Raises:
            ValueError: it isn't the next one, or not as the layout says.
            OSError: it can't be written.
        """
        expected, number = self._pending.pop(0)
        shape, dtype = self._layout[expected]
        if name != expected or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"expected {expected} {tuple(shape)} {dtype}, got {name} {tuple(tensor.shape)} {tensor.dtype}"
            )
        if self._open is None or self._open[0] != number:
            self._close()
            file = (self.folder / self._files[number]).open("wb")
            file.write(_header({name: self._layout[name] for name in self._shards[number]}))
            self._open = number, file
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._open[1].write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Replaces the index in one step and deletes the shards that it doesn't name."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were not written, the first is {self._pending[0][0]}")
        self._close()
        weight_map = {name: file for file, names in zip(self._files, self._shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes(self._layout)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        write_atomically(self.folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))
        for old in [*self.folder.glob(SHARDS), self.folder / "model.safetensors"]:
            if old.name not in self._files:
                old.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._open is not None:
            file = self._open[1]
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._open = None


def _divide(layout: TensorLayout, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _bytes(*entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(*entry)
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _header(layout: TensorLayout) -> bytes:
    entries: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in layout.items():
        end = start + _bytes(shape, dtype)
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
