"""Files written so that a kill leaves the old one or the new one, whole; JSON read back; what identifies a file and a machine."""

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptuning.errors import DataError

TEMPORARY = ".ptuning-*.tmp"
PACKAGES = (
    "ptuning",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "sentencepiece",
    "safetensors",
)

BAD_JSON = (ValueError, RecursionError)  # what json.loads raises for damaged text


# --- writing --------------------------------------------------------------------------------------------------------------


def temporary_in(folder: Path) -> Path:
    """A new name for a file that is not complete yet."""
    return folder / TEMPORARY.replace("*", uuid.uuid4().hex[:12])


def write_atomically(target: Path, write: Callable[[Path], object]) -> Path:
    """Replaces `target` in one step by what `write` puts into a temporary file beside it. Missing folders are made.

    Returns:
        The target.

    Raises:
        OSError: it can't be written; the old file is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_in(target.parent)
    try:
        write(temporary)
        publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


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


def write_text(target: Path, text: str) -> Path:
    """The text as UTF-8. A lone surrogate, which UTF-8 can't hold, becomes a question mark."""
    return write_atomically(target, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def write_json(target: Path, value: Any) -> Path:
    """The value as indented JSON."""
    return write_text(target, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


# --- reading --------------------------------------------------------------------------------------------------------------


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file that must be right.

    Args:
        fix: what to do where it isn't, for the message.

    Raises:
        DataError: it can't be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *BAD_JSON) as cause:
        raise DataError(f"{path}: can't be read as JSON ({cause}): {fix}") from cause
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__} where a JSON object is needed: {fix}")
    return value


def read_json_if_possible(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be missing, damaged or half written; empty where there is none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8", errors="replace"))
    except (OSError, *BAD_JSON):
        return {}
    return value if isinstance(value, dict) else {}


# --- what identifies -------------------------------------------------------------------------------------------------------


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes in 64 hex digits, read piece by piece.

    Raises:
        OSError: it can't be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that can change a figure; "not installed" where one is missing."""
    return {"python": platform.python_version()} | {package: version_of(package) for package in packages}


def version_of(package: str) -> str:
    """Its version; "not installed" also for this package where it runs from a source folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
