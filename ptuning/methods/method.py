"""What the rest of the package asks of a way to tune, and the list of methods.

A method says what trains, how it is put on a base and taken off, how it is saved and loaded, what it needs of memory, and what
a request that is served with it brings along. No other module asks which method it is.
"""

from __future__ import annotations

import logging
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.base import base_fingerprint
from ptuning.checkpoint.manifest import Manifest, read_manifest
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families import Dimensions
from ptuning.language import columns
from ptuning.messages import message
from ptuning.methods.companion import Companion
from ptuning.quantization import Precision, precision_in

log = logging.getLogger("ptuning.methods")


@dataclass(frozen=True)
class MemoryTerms:
    """What decides about a method's memory. Sizes in numbers, not bytes.

    Args:
        trained: numbers that are trained.
        frozen_base: the base's own weights get no gradient.
        positions: extra key/value positions that every token sees.
        inputs: fp32 numbers a token that are kept for gradients beside what a frozen base keeps, all layers together.
        dropped: of these, how many have a dropout mask.
    """

    trained: int
    frozen_base: bool
    positions: int = 0
    inputs: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class SaveTarget:
    """Where and how a training run saves.

    Args:
        folder: may hold an earlier checkpoint, which stays whole until the new one is.
        writes: whether this process writes; all processes take part, because sharded weights are gathered.
        device: where the process group reduces.
        step: of the optimizer.
    """

    folder: Path
    writes: bool
    device: torch.device
    step: int | None = None


class Method(ABC):
    """One way to tune, with its settings."""

    name: str  # of --method, and in manifests
    noun: str  # what is saved, in messages
    learning_rate: float  # where none is given
    options: tuple[str, ...] = ()  # of config.ModelArguments, that are this method's alone
    defaults: ClassVar[dict[str, Any]] = {}  # of those, where a new run doesn't give them
    keeps_base: bool  # the untuned base is still there after training
    merges = False  # it can become part of the base's weights

    @abstractmethod
    def describe(self) -> str:
        """The method and its settings in words."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its manifest says of it."""

    # --- training --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, model: PreTrainedModel) -> None:
        """Makes what trains, freshly initialised, and freezes the rest."""

    @abstractmethod
    def memory(self, base: Dimensions) -> MemoryTerms:
        """What it needs on a base of these widths."""

    # --- on and off ------------------------------------------------------------------------------------------------------

    def refusal(self, precision: Precision) -> str | None:
        """Why it can't be on a base that is stored so, with the fix; None: it can."""
        return None

    @classmethod
    def is_on(cls, model: nn.Module) -> bool:
        """Whether something of this method is attached that can be taken off again."""
        return False

    @classmethod
    def detach(cls, model: PreTrainedModel) -> None:
        """Takes off what is attached, for good."""
        raise NotImplementedError(f"{cls.name} attaches nothing")

    @classmethod
    def off(cls, model: PreTrainedModel) -> AbstractContextManager:
        """Inside, what is attached is off and the model is the bare base."""
        return nullcontext()

    @classmethod
    def served(cls, model: PreTrainedModel, name: str) -> Companion | None:
        """What a request that is answered with it brings along (GenerationRequest.prefix); None: the model itself is tuned."""
        return None

    @classmethod
    def merge(cls, model: PreTrainedModel) -> None:
        """Puts what is attached into the base's own weights, and takes it off; of methods that `merges`.

        Raises:
            ConfigError: the base's weights can't take it.
        """
        raise NotImplementedError(f"{cls.name} can't be merged")

    def next_commands(self, base: str, folder: str, asked: Precision | None = None) -> list[str]:
        """What to type after a run, quoted for a shell.

        Args:
            base: --model_name_or_path.
            folder: --output_dir.
            asked: the precision that the run asked for.
        """
        command = shlex.quote(str(Path(sys.executable).parent / "ptuning"))
        chat, serve = self.where(base, folder)
        head = message("next")
        same = "" if asked is None else f" {asked.option}"
        return [f"{head} {command} chat {chat}{same}", f"{' ' * columns(head)} {command} serve {serve}{same}"]

    def where(self, base: str, folder: str) -> tuple[str, str]:
        """The options of `ptuning chat` and `ptuning serve` that name what was tuned; arguments as `next_commands`."""
        quoted = shlex.quote(folder)
        if not self.keeps_base:
            return f"--model_name_or_path {quoted}", f"--model {quoted}"
        named = shlex.quote(f"{Path(folder).name}={folder}")
        return f"--ptuning_checkpoint {quoted}", f"--model {shlex.quote(base)} --prefix {named}"

    @classmethod
    def parameters(cls, model: PreTrainedModel) -> Iterable[nn.Parameter]:
        """What is attached, in numbers; nothing where the model itself is tuned."""
        return ()

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether a folder without manifest is another program's checkpoint of this method."""
        return False

    @classmethod
    @abstractmethod
    def from_options(cls, options: Any) -> Method:
        """From the model options of a run (config.ModelArguments); a checkpoint to start from brings its own settings.

        Raises:
            ConfigError, CheckpointError: they can't be used.
        """

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Reads a saved checkpoint as far as that goes without its base.

        Returns:
            Its manifest; None where another program wrote it.

        Raises:
            CheckpointError: it is damaged, or not one that can be put on a base.
        """
        raise CheckpointError(
            f"{folder}: holds a complete model; give it as model_name_or_path, without ptuning_checkpoint."
        )

    @classmethod
    def attach(cls, model: PreTrainedModel, folder: Path, base: str | Path) -> Manifest | None:
        """Puts a saved checkpoint on its base.

        Args:
            folder: of the checkpoint.
            base: where the model was loaded from; its fingerprint is compared with the checkpoint's.

        Returns:
            As `read`.

        Raises:
            CheckpointError: unreadable, or of another base or template.
        """
        return cls.read(folder)

    @abstractmethod
    def save(self, model: PreTrainedModel, tokenizer, manifest: Manifest | None, target: SaveTarget) -> None:
        """Writes a checkpoint that `restore` and `attach` read. All processes call it.

        Raises:
            CheckpointError, TrainingError: it can't be written; what was there before is whole.
        """

    @abstractmethod
    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Puts the weights of a checkpoint of the same run back into the model in training."""

    @abstractmethod
    def saved_bytes(self, model: PreTrainedModel) -> int:
        """Disk that `save` takes."""


_METHODS: dict[str, type[Method]] = {}


def add_method(method: type[Method]) -> type[Method]:
    """Makes a method known under its name; a decorator."""
    _METHODS[method.name] = method
    return method


def method_class(name: str) -> type[Method]:
    """The method of a --method or a manifest.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _METHODS:
        raise ConfigError(f"--method {name}: no such method; there are {', '.join(_METHODS)}")
    return _METHODS[name]


def defaults_of(name: str, continues: bool) -> dict[str, Any]:
    """The options that a method brings where they aren't given.

    Args:
        name: of the method.
        continues: whether it goes on from a checkpoint, which has settings of its own.

    Raises:
        ConfigError: there is no such method.
    """
    method = method_class(name)
    return {"learning_rate": method.learning_rate} | ({} if continues else method.defaults)


def method_of(options: Any, trains: bool) -> Method | None:
    """The method of a run's model options, with its settings; None where nothing is tuned.

    Args:
        options: config.ModelArguments.
        trains: whether the run trains; one that only evaluates may still name a tuned checkpoint.

    Raises:
        ConfigError: there is no such method, or its settings can't be used.
    """
    if trains:
        method = method_class(options.method)
        _refuse_options_of_others(method, options, trains)
        return method.from_options(options)
    if options.ptuning_checkpoint is None:
        _refuse_options_of_others(None, options)
        return None
    method = method_of_checkpoint(options.ptuning_checkpoint)
    _refuse_options_of_others(method, options)
    return method.from_options(options)


def _refuse_options_of_others(method: type[Method] | None, options: Any, trains: bool = False) -> None:
    default = {field.name: field.default for field in fields(options)}
    for other in _METHODS.values():
        for name in () if other is method else other.options:
            if getattr(options, name) == default[name]:
                continue
            if method is None:
                raise ConfigError(
                    f"--{name} says what to train, and without --do_train nothing is; to evaluate a tuned {other.noun} give "
                    "--ptuning_checkpoint"
                )
            raise ConfigError(
                f"--{name} is for --method {other.name}, and {'--method is' if trains else 'the checkpoint is of'} {method.name}; "
                "leave one of them out"
            )


def read_checkpoint(folder: str | Path) -> Manifest | None:
    """The manifest of a tuned checkpoint that is put on a base; the rest of it is checked. Errors as `Method.read`."""
    folder = Path(folder).expanduser()
    return method_of_checkpoint(folder).read(folder)


def attach_checkpoint(
    model: PreTrainedModel, folder: str | Path, base: str | Path, notify: Callable[[str], object] = log.warning
) -> Manifest | None:
    """Puts a tuned checkpoint on its base, by whichever method it was tuned; arguments and errors as `Method.attach`.

    Args:
        notify: gets one line where the base had another precision while training.
    """
    folder = Path(folder).expanduser()
    manifest = method_of_checkpoint(folder).attach(model, folder, base)
    if manifest is not None:
        now = precision_in(model.config)
        here, there = "" if now is None else now.name, manifest.base.precision
        if here != there:
            notify(message("other_precision", folder=folder, there=_in_words(there), here=_in_words(here)))
    return manifest


def _in_words(precision: str) -> str:
    return precision or message("unquantized")


def base_of(model_name_or_path: str | None, ptuning_checkpoint: str | None) -> str:
    """The base that was given, or the one that the checkpoint names.

    Raises:
        ConfigError: neither says it.
    """
    if model_name_or_path is not None:
        return model_name_or_path
    if ptuning_checkpoint is None:
        raise ConfigError("give --model_name_or_path, --ptuning_checkpoint, or both")
    manifest = read_checkpoint(ptuning_checkpoint)
    if manifest is None:
        raise ConfigError(f"{ptuning_checkpoint} doesn't say which base it belongs to; give --model_name_or_path")
    return manifest.base.name_or_path


def method_of_checkpoint(folder: str | Path) -> type[Method]:
    """The method of a checkpoint: by its manifest, else by whose other programs' folder it is; a prefix where nothing says so,
    whose `read` then says what it is."""
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        return method_class(manifest.method)
    return next((method for method in _METHODS.values() if method.recognises(folder)), method_class("prefix"))


def check_belongs(manifest: Manifest, folder: Path, base: str | Path, template: str) -> None:
    """Refuses a checkpoint of another base or template.

    Raises:
        CheckpointError: it is one.
    """
    check_template(manifest, folder, template)
    fingerprint = base_fingerprint(base)
    if fingerprint != manifest.base.fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on {manifest.base.name_or_path} (fingerprint {manifest.base.fingerprint}), "
            f"and the base given is {base} (fingerprint {fingerprint}), with other weights. Give the base it was trained on."
        )


def check_template(manifest: Manifest, folder: Path, template: str) -> None:
    """Raises CheckpointError where a checkpoint was trained with another prompt template."""
    if manifest.template != template:
        raise CheckpointError(
            f"{folder}: was trained with the prompt template {manifest.template!r}, and this package builds prompts "
            f"with {template!r}; answers would be off."
        )


def attached(model: nn.Module) -> type[Method] | None:
    """The method that has put something on the model; None on a bare base and on a fully tuned model."""
    return next((method for method in _METHODS.values() if method.is_on(model)), None)


def detach(model: PreTrainedModel) -> None:
    """Takes off whatever a method has attached."""
    if (method := attached(model)) is not None:
        method.detach(model)


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """Inside, whatever a method has attached is off: what "untuned" means everywhere."""
    with ExitStack() as stack:
        method = attached(model)
        if method is not None:
            stack.enter_context(method.off(model))
        yield
