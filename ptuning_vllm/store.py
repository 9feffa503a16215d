"""Prefixes in a folder, read once and kept for the ones used last. For vLLM's workers; raises, and the worker reports it.

Shapes: L layers of the whole model, T length, G key/value groups of the whole model, D head dimension.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

KeyValues = tuple[torch.Tensor, torch.Tensor]  # each (L, T, own groups, D)


class BadPrefix(ValueError):
    """Why a prefix can't be put in front of a request."""


def read(folder: Path, digest: str) -> KeyValues:
    """Keys, rotated by +T, and values, (L, T, G, D) in fp32.

    Args:
        digest: 32 hex digits of the numbers' sha256, which is the file's name and is checked.

    Raises:
        BadPrefix: no such file, or its content is another.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise BadPrefix("the request's kv_transfer_params or cache_salt are not those of a prefix")
    file = folder / f"{digest}.safetensors"
    try:
        tensors = load(file.read_bytes())
        keys, values = tensors["keys"], tensors["values"]
    except (OSError, SafetensorError, KeyError) as cause:
        raise BadPrefix(f"{file}: can't be read ({type(cause).__name__}: {cause})") from cause
    if keys.ndim != 4 or keys.shape != values.shape or {keys.dtype, values.dtype} != {torch.float32}:
        raise BadPrefix(
            f"{file}: keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype}"
        )
    found = hashlib.sha256()
    for tensor in (keys, values):
        found.update(tensor.contiguous().numpy().data)
    if found.hexdigest()[:32] != digest:
        raise BadPrefix(f"{file}: its content is not what its name says; export it again")
    return keys, values


class Prefixes:
    """This worker's share of the prefixes used last.

    Args:
        folder: the store.
        most: prefixes kept in memory; one of T = 128 has 3.7 MB on ChatGLM2-6B in 16 bit.
        share: from the whole tensors to this worker's, on its device and in its dtype.
    """

    def __init__(self, folder: Path, most: int, share: Callable[[torch.Tensor], torch.Tensor]):
        self.folder, self.most, self.share = folder, most, share
        self._kept: OrderedDict[str, KeyValues] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, digest: str, length: int) -> KeyValues:
        """Keys and values.

        Args:
            length: T that the request counted with.

        Raises:
            BadPrefix: it can't be read or has another length.
        """
        found = self._kept.pop(digest, None)
        if found is None:
            keys, values = read(self.folder, digest)
            found = self.share(keys), self.share(values)
        self._kept[digest] = found
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        if found[0].shape[1] != length:
            raise BadPrefix(f"{digest} has {found[0].shape[1]} positions, and the request says {length}")
        return found


def own_groups(groups: int, rank: int, size: int, own: int) -> slice:
    """Which key/value groups a worker of tensor parallelism has; with more workers than groups several have the same.

    Args:
        groups: of the model.
        rank, size: of the worker.
        own: groups a worker has.
    """
    first = rank * groups // size
    return slice(first, first + own)
