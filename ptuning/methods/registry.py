"""The methods that there are, by name, by a run's options, by a checkpoint and by what is on a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.manifest import Manifest, read_manifest
from ptuning.distributed import is_divided
from ptuning.errors import CheckpointError, ConfigError
from ptuning.messages import message, note
from ptuning.methods.method import Method
from ptuning.methods.store import Stored
from ptuning.quantization import precision_in

log = logging.getLogger("ptuning.methods")


_METHODS: dict[str, type[Method]] = {}  # one that is made of others comes after them


def add_method(method: type[Method]) -> type[Method]:
    """Makes a method known under its name; a decorator."""
    _METHODS[method.name] = method
    return method


def methods() -> list[type[Method]]:
    """All that are known."""
    return list(_METHODS.values())


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
            if getattr(options, name) == default[name] or (method is not None and name in method.options):
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
    method = method_of_checkpoint(folder)
    if is_divided() and not method.divides:
        raise CheckpointError(
            f"{folder}: a {method.noun} can't be put on a base that --tensor_parallel divides; merge it first (ptuning export "
            "--merge), or leave --tensor_parallel out"
        )
    manifest = method.attach(model, folder, base)
    if manifest is not None:
        now = precision_in(model.config)
        here, there = "" if now is None else now.name, manifest.base.precision
        if here != there:
            text = message("other_precision", folder=folder, there=_in_words(there), here=_in_words(here))
            notify(note(text))
    return manifest


def store_checkpoint(folder: str | Path, base: str | Path, store: Path) -> tuple[Stored, Manifest | None, type[Method]]:
    """Puts a tuned checkpoint where vLLM finds it, by whichever method it was tuned; arguments and errors as `Method.store`."""
    folder = Path(folder).expanduser()
    method = method_of_checkpoint(folder)
    return method.store(folder, base, store), read_manifest(folder), method


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


def attached(model: nn.Module) -> type[Method] | None:
    """The method that has put something on the model; None on a bare base and on a fully tuned model."""
    return next((method for method in reversed(_METHODS.values()) if method.is_on(model)), None)


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
