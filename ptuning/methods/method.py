"""What the rest of the package asks of a way to tune.

A method says what trains, how it is put on a base and taken off, how it is saved and loaded, what it needs of memory, and what
a request that is served with it brings along. No other module asks which method it is.
"""

from __future__ import annotations

import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.base import base_fingerprint
from ptuning.checkpoint.manifest import Manifest
from ptuning.errors import CheckpointError
from ptuning.families import Dimensions
from ptuning.language import columns
from ptuning.messages import message
from ptuning.methods.companion import Companion
from ptuning.methods.store import Stored
from ptuning.quantization import Precision


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
    divides = False  # it can be on a base whose matrices are divided among processes
    trains_on_parts = False  # it can train where each process has some positions of every row (--sequence_parallel)

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

    def finish(self, model: PreTrainedModel) -> None:  # noqa: B027  most keep all of it
        """After the last step: makes what is kept of what was trained; computes the same. All processes call it."""

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
    def store(cls, folder: Path, base: str | Path, store: Path) -> Stored:
        """Puts a saved checkpoint where vLLM finds it, without loading the base.

        Args:
            folder: of the checkpoint.
            base: its folder or hub id.
            store: shared with vLLM; made if it isn't there.

        Raises:
            CheckpointError: unreadable, of another base or template, or a method that vLLM can't choose by request.
            OSError: it can't be written.
        """
        raise CheckpointError(
            f"{folder}: a {cls.noun} can't be chosen by requests to vLLM; export it with --format vllm and let vLLM serve that"
        )

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
            f"with {template!r} for this base; answers would be off. Give the base it was trained on."
        )
