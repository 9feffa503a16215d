"""The base and the named prefixes that are served."""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.checkpoint.base import resolve_base
from ptuning.checkpoint.manifest import FILE, read_manifest
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.generation import Prefix
from ptuning.loading import attach_checkpoint, load_model, self_test
from ptuning.methods.prefix.attach import detach_prefix, prefix_of
from ptuning.serving.backend import BASE, NameTaken, Refused, Served, UnknownModel

log = logging.getLogger("ptuning.serving")

_NAME = re.compile(r"\w[\w.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model and what the engine needs of it; prefix is None for the base."""

    served: Served
    prefix: Prefix | None


class Models:
    """One base in memory, and prefixes by name.

    Args:
        model: the base, without a prefix attached.
        tokenizer: of the base.
        folder: where the base was loaded from.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, folder: str | Path):
        self.model, self.tokenizer, self.folder = model, tokenizer, Path(folder)
        base = resolve_base(folder)
        full = read_manifest(base)
        # A hub id's last part; a local folder's own name, also where it is given as "." or through a link.
        local = self.folder.expanduser()
        name = (local.resolve() if local.is_dir() else self.folder).name or BASE
        source_prefix = full.source_prefix if full else ""
        self.base = Loaded(Served(name, int(time.time()), source_prefix), None)
        self._prefixes: dict[str, Loaded] = {}

    @classmethod
    def load(cls, model_name_or_path: str | Path, dtype: str = "auto", device: str | None = None) -> "Models":
        """Loads a base or a fully tuned model. Errors as in `ptuning.load_model`."""
        return cls(*load_model(model_name_or_path, dtype=dtype, device=device), model_name_or_path)

    def __iter__(self) -> Iterator[Loaded]:
        """The base, then the prefixes by name."""
        yield self.base
        yield from sorted(self._prefixes.copy().values(), key=lambda loaded: loaded.served.name)

    def find(self, name: str) -> Loaded:
        """The model of this name.

        Raises:
            UnknownModel: none; the message lists what there is.
        """
        if name in (BASE, self.base.served.name):
            return self.base
        if (loaded := self._prefixes.get(name)) is not None:
            return loaded
        names = ", ".join(loaded.served.name for loaded in self)
        raise UnknownModel(f"there is no model {name!r}; there are {names}")

    def check_name(self, name: str) -> None:
        """Raises Refused for what can't be a name, NameTaken for one that is in use."""
        if not _NAME.fullmatch(name):
            raise Refused(f"{name!r} can't be a model's name; use up to 64 letters, digits, '_', '-' and '.'")
        if name in (BASE, self.base.served.name):
            raise NameTaken(f"{name!r} is the base's name; give the prefix another one")
        if name in self._prefixes:
            raise NameTaken(f"there is a prefix {name!r} already; remove it first, or use another name")

    def read(self, name: str, folder: str | Path) -> Loaded:
        """Reads a prefix, checks that it belongs to the base and changes its logits, and computes its keys and values.

        Only the thread that uses the model may call this. The model is left without a prefix.

        Raises:
            CheckpointError: damaged, of another base or template, or without effect.
        """
        model = self.model
        try:
            checkpoint = attach_checkpoint(model, folder, self.folder)
            self_test(model)
            prefix = Prefix.of(name, prefix_of(model), model.dtype)
        finally:
            if prefix_of(model) is not None:
                detach_prefix(model)
        source_prefix = checkpoint.source_prefix if checkpoint else ""
        return Loaded(Served(name, int(time.time()), source_prefix, prefix.length), prefix)

    def add(self, loaded: Loaded) -> None:
        self._prefixes[loaded.served.name] = loaded

    def remove(self, name: str) -> Loaded:
        """Takes a prefix out.

        Raises:
            UnknownModel: there is none of this name.
            Refused: it is the base.
        """
        loaded = self.find(name)
        if loaded is self.base:
            raise Refused(f"{name!r} is the base, which can't be removed; only prefixes can")
        return self._prefixes.pop(name)

    def add_named(self, prefixes: Sequence[tuple[str, str]]) -> None:
        """Loads what the command line names.

        Raises:
            ConfigError: two of the same name, or a name that can't be used.
            CheckpointError: as in `read`.
        """
        for name, folder in prefixes:
            try:
                self.check_name(name)
            except (NameTaken, Refused) as error:
                raise ConfigError(f"--prefix {name}={folder}: {error}") from None
            self.add(self.read(name, folder))
            log.info("prefix loaded", extra={"fields": {"model": name, "folder": str(folder)}})

    def add_found(self, parent: Path) -> None:
        """Loads every prefix of this base right under `parent`, and says which of the others it leaves out and why."""
        for folder in sorted(path.parent for path in parent.glob(f"*/{FILE}")):
            try:
                self.check_name(folder.name)
                self.add(self.read(folder.name, folder))
            except (CheckpointError, NameTaken, Refused) as error:
                log.warning("prefix left out", extra={"fields": {"folder": str(folder), "reason": str(error)}})
            else:
                log.info("prefix loaded", extra={"fields": {"model": folder.name, "folder": str(folder)}})
