"""What is served: the base and prefixes by name; and the one that is loaded in this process."""

import logging
import re
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

from ptuning.checkpoint.base import resolve_base
from ptuning.checkpoint.manifest import read_manifest
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families import Template, family_of
from ptuning.kernels import swap_to_answer
from ptuning.loading import load_model
from ptuning.methods import attach_checkpoint, attached, detach, self_test
from ptuning.quantization import choose_kernels
from ptuning.runs.folder import MANIFEST
from ptuning.serving.backend import BASE, NameTaken, Refused, Served, UnknownModel

log = logging.getLogger("ptuning.serving")

_NAME = re.compile(r"\w[\w.-]{0,63}")


ReadPrefix = Callable[[str, str | Path], Served]  # (name, folder); raises CheckpointError


class Names(Protocol):
    """What a Registry keeps prefixes in: a dict, or what several servers share."""

    def copy(self) -> dict[str, Served]: ...
    def get(self, name: str, /) -> Served | None: ...
    def pop(self, name: str, /) -> Served: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __setitem__(self, name: str, served: Served, /) -> None: ...


class Registry:
    """Names of the base and of prefixes. Holds no model, so that it serves any engine.

    Args:
        folder: of the base, or its hub id.
        names: where prefixes are kept; default: in this process.
        aliases: further names, (name, of which model); "" is the base, and the first of its names is the one that is shown.
    """

    def __init__(self, folder: str | Path, names: Names | None = None, aliases: Sequence[tuple[str, str]] = ()):
        manifest = read_manifest(resolve_base(folder))
        # A hub id's last part; a local folder's own name, also where it is given as "." or through a link.
        local = Path(folder).expanduser()
        name = (local.resolve() if local.is_dir() else Path(folder)).name or BASE
        shown = next((alias for alias, model in aliases if not model), name)
        self.base = Served(shown, int(time.time()), manifest.source_prefix if manifest else "")
        self._aliases = {name: BASE} | {alias: model or BASE for alias, model in aliases}
        self._prefixes: Names = {} if names is None else names

    def __iter__(self) -> Iterator[Served]:
        """The base, then the prefixes by name."""
        yield self.base
        yield from sorted(self._prefixes.copy().values(), key=lambda served: served.name)

    def find(self, name: str) -> Served:
        """The model of this name.

        Raises:
            UnknownModel: none; the message lists what there is.
        """
        known = name if name in self._prefixes else self._aliases.get(name, name)
        if known in (BASE, self.base.name):
            return self.base
        if (served := self._prefixes.get(known)) is not None:
            return served
        names = ", ".join(served.name for served in self)
        raise UnknownModel(f"there is no model {name!r}; there are {names}")

    def check_name(self, name: str, known: Container[str] | None = None) -> None:
        """Raises Refused for what can't be a name, NameTaken for one that is in use.

        Args:
            known: the prefixes that count; default: all there are.
        """
        if not _NAME.fullmatch(name):
            raise Refused(f"{name!r} can't be a model's name; use up to 64 letters, digits, '_', '-' and '.'")
        if name in (BASE, self.base.name):
            raise NameTaken(f"{name!r} is the base's name; give the prefix another one")
        if name in self._aliases:
            raise NameTaken(
                f"{name!r} is another name of {self._aliases[name]!r} (--served_model_name); give the prefix another one"
            )
        if name in (self._prefixes if known is None else known):
            raise NameTaken(f"there is a prefix {name!r} already; remove it first, or use another name")

    def add(self, served: Served) -> None:
        self._prefixes[served.name] = served

    def remove(self, name: str) -> Served:
        """Takes a prefix out.

        Raises:
            UnknownModel: there is none of this name.
            Refused: it is the base.
        """
        served = self.find(name)
        if served is self.base:
            raise Refused(f"{name!r} is the base, which can't be removed; only prefixes can")
        return self._prefixes.pop(served.name)

    def add_named(self, prefixes: Sequence[tuple[str, str]], read: ReadPrefix) -> None:
        """Adds what the command line names, in the place of what an earlier start has left under the same name.

        Raises:
            ConfigError: two of the same name, or a name that can't be used.
            CheckpointError: a folder can't be read.
        """
        added: list[str] = []
        for name, folder in prefixes:
            try:
                self.check_name(name, added)
            except (NameTaken, Refused) as error:
                raise ConfigError(f"--prefix {name}={folder}: {error}") from None
            self.add(read(name, folder))
            added.append(name)
            log.info("prefix loaded", extra={"fields": {"model": name, "folder": str(folder)}})

    def check_aliases(self) -> None:
        """Raises ConfigError where a further name is of no model that there is."""
        for alias, model in self._aliases.items():
            try:
                self.find(model)
            except UnknownModel as error:
                raise ConfigError(f"--served_model_name {alias}={model}: {error}") from None

    def add_found(self, parent: Path, read: ReadPrefix) -> None:
        """Adds every prefix of this base right under `parent`, and says which of the others it leaves out and why."""
        for folder in sorted(path.parent for path in parent.glob(f"*/{MANIFEST}")):
            try:
                self.check_name(folder.name, ())
                self.add(read(folder.name, folder))
            except (CheckpointError, NameTaken, Refused) as error:
                log.warning("prefix left out", extra={"fields": {"folder": str(folder), "reason": str(error)}})
            else:
                log.info("prefix loaded", extra={"fields": {"model": folder.name, "folder": str(folder)}})


def saved_at(folder: str | Path) -> int:
    """Seconds since 1970 when the newest file of a checkpoint was written."""
    times = [file.stat().st_mtime for file in Path(folder).iterdir() if file.is_file()]
    return int(max(times, default=Path(folder).stat().st_mtime))


@dataclass(frozen=True)
class LoadedModel:
    """The base in this process.

    Args:
        model: without anything attached.
        template: over its tokenizer.
        folder: where it was loaded from.
    """

    model: PreTrainedModel
    template: Template
    folder: str | Path

    @classmethod
    def load(
        cls,
        model_name_or_path: str | Path,
        dtype: str = "auto",
        quantization_bit: int | None = None,
        quantization: str | None = None,
        double_quantization: bool = False,
        cpu_kernels: str | None = None,
        device_map: str | None = None,
        tensor_parallel: int | None = None,
        say: Callable[[str], object] = log.info,
        kernels: str | None = None,
    ) -> "LoadedModel":
        """Loads a base or a fully tuned model. Arguments and errors as in `ptuning.load_model`, `choose_kernels` and
        `swap_to_answer`."""
        model, tokenizer = load_model(
            model_name_or_path,
            dtype=dtype,
            quantization_bit=quantization_bit,
            quantization=quantization,
            double_quantization=double_quantization,
            device_map=device_map,
            tensor_parallel=tensor_parallel,
            say=say,
        )
        choose_kernels(model, cpu_kernels, say)
        swap_to_answer(model, kernels, say)
        return cls(model, family_of(model.config).template(tokenizer), model_name_or_path)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.max_position_embeddings

    def read_prefix(self, name: str, folder: str | Path) -> Served:
        """Reads what requests can be answered with (a prefix, a LoRA), and checks that it belongs to the base and changes its
        logits.

        Only the thread that uses the model may call this. The model is left bare.

        Raises:
            CheckpointError: damaged, of another base or template, or without effect.
        """
        try:
            manifest = attach_checkpoint(self.model, folder, self.folder, log.warning)
            self_test(self.model)
            method = attached(self.model)
            assert method is not None  # the self-test has passed
            prefix = method.served(self.model, name)
        finally:
            detach(self.model)
        if prefix is None:
            raise CheckpointError(f"{folder}: a {method.noun} can't be chosen by requests; serve it as --model.")
        source_prefix = manifest.source_prefix if manifest else ""
        return Served(name, saved_at(folder), source_prefix, prefix.length, prefix, method.noun)
