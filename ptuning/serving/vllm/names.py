"""Which name is which tuned checkpoint, in a file that all servers before the same vLLM share."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptuning.errors import CheckpointError, ConfigError, DataError
from ptuning.methods import Stored, store_checkpoint
from ptuning.methods.store import sweep
from ptuning.runs.files import read_json, write_json
from ptuning.serving.backend import Served, UnknownModel
from ptuning.serving.models import saved_at

log = logging.getLogger("ptuning.serving")

FILE, LOCK = "names.json", "names.lock"
_UNNAMED_DAYS = 7
_FORMAT, _VERSION = "ptuning-names", 1


class NameTable:
    """The names in a prefix store, as `Registry` keeps them.

    Every look reads the file again if it is another than at the last one, so that what one server adds is known to all. A change is
    made under a lock and replaces the file in one step.

    Args:
        store: the folder; made if it isn't there.
        base: fingerprint of the base that all of them belong to.

    Raises:
        ConfigError: the folder can't be used, or is another base's.
    """

    def __init__(self, store: Path, base: str):
        self.store, self.base = store, base
        self._mark: tuple[int, int, int] | None = None
        self._known: dict[str, Served] = {}
        try:
            store.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._known = self._read() if (store / FILE).exists() else {}
        except OSError as cause:
            raise ConfigError(f"--prefix_store {store}: can't be written ({cause})") from cause
        except DataError as cause:
            raise ConfigError(f"--prefix_store: {cause}") from cause

    def copy(self) -> dict[str, Served]:
        """What there is now."""
        try:
            status = (self.store / FILE).stat()
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            if mark != self._mark:
                self._known, self._mark = self._read(), mark
        except FileNotFoundError:
            if self._mark is not None:
                log.warning(
                    "table of names is gone; the last one is used", extra={"fields": {"folder": str(self.store)}}
                )
        except (OSError, DataError, ConfigError) as error:
            log.warning("table of names can't be read; the last one is used", extra={"fields": {"reason": str(error)}})
        return self._known.copy()

    def get(self, name: str) -> Served | None:
        return self.copy().get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.copy()

    def __setitem__(self, name: str, served: Served) -> None:
        with self._changed() as names:
            names[name] = served

    def claim(self, served: Served) -> bool:
        """Adds it unless its name has been taken, here or by another server; returns whether it was added."""
        with self._changed() as names:
            return names.setdefault(served.name, served) is served

    def pop(self, name: str) -> Served:
        """Takes one out.

        Raises:
            UnknownModel: another server was faster.
        """
        with self._changed() as names:
            if name not in names:
                raise UnknownModel(f"there is no model {name!r} any more")
            return names.pop(name)

    def sweep(self) -> None:
        """Deletes what has had no name for days from the store: answers of those that used it have ended long ago."""
        with self._locked():
            gone = sweep(
                self.store, (served.prefix or Stored() for served in self.copy().values()), _UNNAMED_DAYS * 86400
            )
        if gone:
            log.info("unused files deleted from the prefix store", extra={"fields": {"files": gone}})

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Served]]:
        with self._locked():
            names = self.copy()
            yield names
            entries = {name: _entry(served) for name, served in sorted(names.items())}
            write_json(self.store / FILE, {"format": _FORMAT, "version": _VERSION, "base": self.base, "names": entries})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.store / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, Served]:
        path = self.store / FILE
        values = read_json(path, "delete it and start every server with --prefix again")
        if (values.get("format"), values.get("version")) != (_FORMAT, _VERSION):
            raise ConfigError(
                f"--prefix_store: {path} is {values.get('format')!r} version {values.get('version')!r}, expected {_FORMAT!r} "
                f"version {_VERSION}; give another folder"
            )
        if values.get("base") != self.base:
            raise ConfigError(
                f"--prefix_store: {path} is of the base with fingerprint {values.get('base')}, and --model has {self.base}; give "
                "each base a folder of its own"
            )
        try:
            return {name: _served(name, entry) for name, entry in values["names"].items()}
        except (KeyError, TypeError, AttributeError) as cause:
            raise DataError(
                f"{path}: is damaged ({cause!r}): delete it and start every server with --prefix again"
            ) from cause


def put(name: str, folder: str | Path, base: str, store: Path) -> Served:
    """Puts a tuned checkpoint into the store; its name isn't in the table yet.

    Raises:
        CheckpointError: it isn't one for this base, or can't be written.
    """
    try:
        stored, manifest, method = store_checkpoint(folder, base, store)
    except OSError as cause:
        raise CheckpointError(f"{folder}: can't be put into {store} ({cause})") from cause
    source_prefix = manifest.source_prefix if manifest else ""
    return Served(name, saved_at(folder), source_prefix, stored.length, stored, method.noun)


def _entry(served: Served) -> dict[str, Any]:
    about = {name: getattr(served, name) for name in ("created", "source_prefix", "kind")}
    return asdict(served.prefix) | about


def _served(name: str, entry: dict[str, Any]) -> Served:
    stored = Stored(entry["prefix"], entry["length"], entry["lora"])
    return Served(name, entry["created"], entry["source_prefix"], stored.length, stored, entry["kind"])
