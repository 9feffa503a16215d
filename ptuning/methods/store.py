"""The folder that vLLM and the servers before it share: what was tuned, in files whose names are their content's.

A prefix is DIGEST.safetensors, `keys` and `values` of (L, T, G, D) in fp32, keys rotated by +T, because vLLM counts the positions
of real tokens from T; ptuning_vllm/ reads it. A LoRA is a folder of peft's. A file never changes, so that neither a server nor
vLLM's cache of computed blocks can take one for another.

Shapes: L layers, T length of the prefix, G key/value groups, D head dimension.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptuning.runs.files import write_atomically

DIGITS = 32
LORA = "lora-"  # in front of the digest
_OURS = re.compile(rf"[0-9a-f]{{{DIGITS}}}\.safetensors|{LORA}[0-9a-f]{{{DIGITS}}}")


@dataclass(frozen=True)
class Stored:
    """What a request to vLLM names to be answered with something tuned.

    Args:
        prefix: digest of the prefix; empty: none.
        length: T; 0 without a prefix.
        lora: name of the LoRA's folder; empty: none.
    """

    prefix: str = ""
    length: int = 0
    lora: str = ""


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """32 hex digits of the numbers, which are contiguous fp32 on the CPU."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().data)
    return found.hexdigest()[:DIGITS]


def store_prefix(keys_LTGD: torch.Tensor, values_LTGD: torch.Tensor, store: Path) -> Stored:
    """Writes a prefix, unless it is there.

    Args:
        keys_LTGD: rotated by +T.

    Raises:
        OSError: it can't be written.
    """
    tensors = {"keys": keys_LTGD.contiguous(), "values": values_LTGD.contiguous()}
    name = digest(tensors.values())
    file = store / f"{name}.safetensors"
    if not mark_used(file):
        write_atomically(file, lambda path: save_readable(tensors, path))
    return Stored(prefix=name, length=keys_LTGD.shape[1])


def save_readable(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a file that vLLM can read where it runs as another user; safetensors makes it the owner's alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def mark_used(file: Path) -> bool:
    """Whether a file is in the store; `sweep` then takes it for one that was put there now."""
    with contextlib.suppress(OSError):  # another user's, who alone can mark it
        os.utime(file)
    return file.is_file()


def sweep(store: Path, named: Iterable[Stored], seconds: float) -> list[str]:
    """Deletes what no name has and nobody has put there for so long, such as that of evaluations. Nothing else in the folder is
    touched.

    Args:
        named: what is kept whatever its age.

    Returns:
        The names of what was deleted.
    """
    keep = {name for each in named for name in (f"{each.prefix}.safetensors", each.lora)}
    gone = []
    for path in sorted(store.iterdir()):
        if path.name in keep or not _OURS.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # another server was faster, or it is another user's
            if time.time() - max(file.stat().st_mtime for file in (path, *path.glob("*"))) > seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                gone.append(path.name)
    return gone
