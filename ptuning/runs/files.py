"""Files of a run (work in progress)."""

import hashlib
import os
import platform
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TEMPORARY = ".ptuning-*.tmp"
PACKAGES = ("ptuning", "torch", "transformers", "accelerate", "deepspeed", "peft", "sentencepiece", "safetensors")


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Replaces `target` in one step by what `write` puts into a temporary file beside it."""
    temporary = temporary_in(target.parent)
    write(temporary)
    publish(temporary, target)


def publish(temporary: Path, target: Path) -> None:
    """Renames a written file to its final name once its bytes are on the disk, not only in the system's memory."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    if os.name == "posix":  # elsewhere a folder can't be opened
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def temporary_in(folder: Path) -> Path:
    return folder / TEMPORARY.replace("*", uuid.uuid4().hex[:12])


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def package_version() -> str:
    try:
        return version("ptuning")
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
