"""A LoRA and a prefix on one frozen base, trained together: each in a folder of its own, which is a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.manifest import Manifest, read_manifest
from ptuning.errors import CheckpointError
from ptuning.families import Dimensions
from ptuning.methods.companion import Companion
from ptuning.methods.lora.method import LoraMethod
from ptuning.methods.lora.served import ServedLora
from ptuning.methods.method import MemoryTerms, Method, SaveTarget
from ptuning.methods.prefix.encoder import Prefix
from ptuning.methods.prefix.method import PrefixMethod
from ptuning.methods.registry import add_method
from ptuning.methods.store import Stored
from ptuning.quantization import Precision
from ptuning.runs.files import sha256_of
from ptuning.runs.folder import MANIFEST

NAME = "lora+prefix"  # of --method, and in manifests

# In the order in which they are put on: a LoRA's "all layers" are the base's, not those of a prefix's projection.
_PARTS: dict[str, type[Method]] = {LoraMethod.name: LoraMethod, PrefixMethod.name: PrefixMethod}
_SHA256 = "sha256 of the parts"  # in the manifest's settings


@add_method
class LoraPrefixMethod(Method):
    """Trains a LoRA and a prefix at one learning rate.

    Args:
        parts: the two methods with their settings, by name.
    """

    name = NAME
    noun = "LoRA and prefix"
    learning_rate = 5e-3
    keeps_base = True
    options = (*LoraMethod.options, *PrefixMethod.options)
    defaults = LoraMethod.defaults | PrefixMethod.defaults

    def __init__(self, parts: dict[str, Method]):
        self.parts = parts

    @classmethod
    def from_options(cls, options: Any) -> LoraPrefixMethod:
        folder = options.ptuning_checkpoint
        if folder is None:
            return cls({name: part.from_options(options) for name, part in _PARTS.items()})
        cls.read(Path(folder).expanduser())
        folders = {name: str(Path(folder).expanduser() / name) for name in _PARTS}
        return cls(
            {n: part.from_options(replace(options, ptuning_checkpoint=folders[n])) for n, part in _PARTS.items()}
        )

    def describe(self) -> str:
        return ", ".join(part.describe() for part in self.parts.values())

    def settings(self) -> dict[str, Any]:
        return {name: value for part in self.parts.values() for name, value in part.settings().items()}

    def start(self, model: PreTrainedModel) -> None:
        for part in self.parts.values():
            part.start(model)
        for parameter in self.parameters(model):  # each has frozen everything else
            parameter.requires_grad_(True)

    def finish(self, model: PreTrainedModel) -> None:
        for part in self.parts.values():
            part.finish(model)

    def memory(self, base: Dimensions) -> MemoryTerms:
        lora, prefix = (part.memory(base) for part in self.parts.values())
        return replace(lora, trained=lora.trained + prefix.trained, positions=prefix.positions)

    def refusal(self, precision: Precision) -> str | None:
        return next((why for part in self.parts.values() if (why := part.refusal(precision)) is not None), None)

    @classmethod
    def is_on(cls, model: nn.Module) -> bool:
        return all(part.is_on(model) for part in _PARTS.values())

    @classmethod
    def detach(cls, model: PreTrainedModel) -> None:
        for part in _PARTS.values():
            part.detach(model)

    @classmethod
    @contextmanager
    def off(cls, model: PreTrainedModel) -> Iterator[None]:
        trained = [parameter for parameter in cls.parameters(model) if parameter.requires_grad]
        with LoraMethod.off(model), PrefixMethod.off(model):
            yield
        for parameter in trained:  # putting the prefix back has frozen everything else
            parameter.requires_grad_(True)

    @classmethod
    def served(cls, model: PreTrainedModel, name: str) -> ServedLoraPrefix:
        return ServedLoraPrefix(name, LoraMethod.served(model, name), PrefixMethod.served(model, name))

    @classmethod
    def store(cls, folder: Path, base: str | Path, store: Path) -> Stored:
        cls.read(folder)
        lora, prefix = (part.store(folder / name, base, store) for name, part in _PARTS.items())
        return replace(prefix, lora=lora.lora)

    @classmethod
    def parameters(cls, model: PreTrainedModel) -> Iterable[nn.Parameter]:
        return [parameter for part in _PARTS.values() for parameter in part.parameters(model)]

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        manifest = read_manifest(folder)
        if manifest is None or manifest.method != NAME:
            found = "nothing of this package" if manifest is None else f"a checkpoint of method {manifest.method!r}"
            raise CheckpointError(f"{folder}: expected one of method {NAME!r}, found {found}.")
        saved = manifest.settings.get(_SHA256)
        for name, part in _PARTS.items():
            file = folder / name / MANIFEST
            if not file.is_file():
                raise CheckpointError(f"{folder}: its part {name}/ is missing; copy the whole folder.")
            if not isinstance(saved, dict) or saved.get(name) != sha256_of(file):
                raise CheckpointError(
                    f"{file}: not of the save that {folder / MANIFEST} tells of; copy the folder again."
                )
            part.read(folder / name)
        return manifest

    @classmethod
    def attach(cls, model: PreTrainedModel, folder: Path, base: str | Path) -> Manifest | None:
        manifest = cls.read(folder)
        for name, part in _PARTS.items():
            part.attach(model, folder / name, base)
        return manifest

    def save(self, model: PreTrainedModel, tokenizer, manifest: Manifest | None, target: SaveTarget) -> None:
        for name, part in self.parts.items():
            about = None if manifest is None else replace(manifest, method=name, settings=part.settings())
            part.save(model, tokenizer, about, replace(target, folder=target.folder / name))
        if target.writes and manifest is not None:
            saved = {name: sha256_of(target.folder / name / MANIFEST) for name in self.parts}
            try:
                replace(manifest, settings=manifest.settings | {_SHA256: saved}).write(target.folder)
            except OSError as cause:
                raise CheckpointError(f"{target.folder}: {MANIFEST} can't be written ({cause}).") from cause

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        self.read(folder)
        for name, part in self.parts.items():
            part.restore(model, folder / name)

    def saved_bytes(self, model: PreTrainedModel) -> int:
        return sum(part.saved_bytes(model) for part in self.parts.values())


@dataclass(frozen=True, eq=False)
class ServedLoraPrefix(Companion):
    """Both of one name, for single rows of a batch.

    Args:
        name: for the caller.
        lora: computes the rows.
        prefix: in front of their own keys and values.
    """

    name: str
    lora: ServedLora
    prefix: Prefix

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.prefix.length

    @property
    def key_values(self) -> torch.Tensor:  # type: ignore[override]
        return self.prefix.key_values

    def on(self, model: PreTrainedModel, rows: Sequence[int]) -> AbstractContextManager:
        return self.lora.on(model, rows)
