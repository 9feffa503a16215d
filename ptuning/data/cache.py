"""Arrow files on disk, under a fingerprint of all that they were made from: made once on a machine, mapped into memory by every
process, and there at once in the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
from accelerate import PartialState
from datasets import Dataset

from ptuning.errors import ConfigError, PTuningError

ABOUT = "about.json"  # what goes with the rows; written last, so a folder that has it is whole
_VERSION = 2  # part of every key: raise it when the same file would become other rows, or other words about them


def key_of(*parts: object) -> str:
    """A fingerprint of values that JSON or `str` can write."""
    text = json.dumps([_VERSION, *parts], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """In datasets' own cache, which HF_DATASETS_CACHE and HF_HOME move."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "ptuning"


def cached(name: str, build: Callable[[Path], dict], overwrite: bool = False) -> tuple[Dataset, dict]:
    """Rows from the cache. Where they aren't there, one process of each machine makes them and the others wait for it.

    Args:
        name: of the rows, with their key.
        build: writes .arrow files into the folder it is given, and returns what goes with them as JSON values.
        overwrite: make them again.

    Raises:
        PTuningError: as `build` raises it, on every process.
        ConfigError: the cache can't be written.
    """
    folder, state, problem = cache_folder() / name, PartialState(), None
    with state.local_main_process_first():  # which leaves the others waiting for ever if it is left by an error
        try:
            if (overwrite and state.is_local_main_process) or not (folder / ABOUT).is_file():
                _make(folder, build, overwrite)
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            files = [Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
        except PTuningError as error:
            problem = error
        except OSError as error:
            problem = ConfigError(
                f"{error.filename or folder}: the cache of data can't be used ({error.strerror or error}); make room, or "
                "name another place with HF_DATASETS_CACHE"
            )
    if problem is not None:
        raise problem
    return files[0] if len(files) == 1 else datasets.concatenate_datasets(files), about


def _make(folder: Path, build: Callable[[Path], dict], overwrite: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: other runs may make the same rows, or be stopped.
    part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    try:
        with _quiet():
            about = build(part)
        (part / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and (overwrite or not (folder / ABOUT).is_file()):
            folder.rename(part / "replaced")
        try:
            part.rename(folder)
        except OSError:
            if not (folder / ABOUT).is_file():  # else another run was faster
                raise
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own progress bars and notes."""
    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
