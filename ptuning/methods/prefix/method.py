"""P-Tuning v2 as a method: a learned key/value prefix on a frozen base."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.base import resolve_base
from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.partitioned import gathered, whole_shape
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families import Dimensions, family_of, read_config
from ptuning.messages import message
from ptuning.methods.method import MemoryTerms, Method, SaveTarget, check_belongs
from ptuning.methods.prefix.attach import (
    attach_encoder,
    attach_prefix,
    attached_prefix,
    detach_prefix,
    prefix_of,
    without_prefix,
)
from ptuning.methods.prefix.checkpoint import for_base, save_prefix
from ptuning.methods.prefix.encoder import DROPOUT, Prefix, PrefixShape
from ptuning.methods.prefix.export import export_vllm
from ptuning.methods.prefix.read import PREFIX, read_prefix
from ptuning.methods.registry import add_method
from ptuning.methods.store import Stored


@add_method
class PrefixMethod(Method):
    """Trains the prefix alone.

    Args:
        pre_seq_len: T.
        prefix_projection: the reparametrised variant.
        prefix_dropout: on the prefix keys and values while training.
        fold_projection: keep what the projection computes, a plain prefix, instead of the projection.

    Raises:
        ConfigError: a value out of its range.
    """

    name = PREFIX
    noun = "prefix"
    learning_rate = 2e-2
    keeps_base = True
    divides = True
    trains_on_parts = True
    options = ("pre_seq_len", "prefix_projection", "prefix_dropout", "fold_projection")
    defaults: ClassVar[dict[str, Any]] = {"pre_seq_len": 128}

    def __init__(
        self,
        pre_seq_len: int,
        prefix_projection: bool = False,
        prefix_dropout: float = DROPOUT,
        fold_projection: bool = False,
    ):
        if pre_seq_len < 1:
            raise ConfigError(f"--pre_seq_len is {pre_seq_len}; use at least 1 (official: 128)")
        if not 0 <= prefix_dropout < 1:
            raise ConfigError(f"--prefix_dropout is {prefix_dropout}; use 0 up to, not including, 1 (official: 0.1)")
        if fold_projection and not prefix_projection:
            raise ConfigError(
                "--fold_projection is for --prefix_projection true; a plain prefix has no projection to fold"
            )
        self.pre_seq_len, self.prefix_projection, self.prefix_dropout = pre_seq_len, prefix_projection, prefix_dropout
        self.fold_projection = fold_projection

    @classmethod
    def from_options(cls, options: Any) -> "PrefixMethod":
        length, projection = options.pre_seq_len, options.prefix_projection
        if options.ptuning_checkpoint is not None:
            checkpoint = read_prefix(options.ptuning_checkpoint)
            for name, expected in (("pre_seq_len", length), ("prefix_projection", projection or None)):
                found = getattr(checkpoint, name)
                if expected is not None and expected != found:
                    raise CheckpointError(
                        f"{checkpoint.folder}: {name} is {found} in the checkpoint and {expected} was asked for; leave {name} "
                        "out, it is read from the checkpoint."
                    )
            length, projection = checkpoint.pre_seq_len, checkpoint.prefix_projection
        return cls(length, projection, options.prefix_dropout, options.fold_projection)

    def describe(self) -> str:
        projection = message("projection") if self.prefix_projection else ""
        return message("prefix_of", length=self.pre_seq_len, projection=projection)

    def settings(self) -> dict[str, Any]:
        return {"pre_seq_len": self.pre_seq_len, "prefix_projection": self.prefix_projection}

    def start(self, model: PreTrainedModel) -> None:
        if prefix_of(model) is None:  # else it goes on from a checkpoint's
            attach_prefix(model, self.pre_seq_len, self.prefix_projection)
        attached_prefix(model).dropout.p = self.prefix_dropout

    def finish(self, model: PreTrainedModel) -> None:
        if not self.fold_projection:
            return
        encoder = attached_prefix(model)
        with gathered(encoder.parameters()):
            attach_encoder(model, encoder.folded())
        self.prefix_projection = False

    def memory(self, base: Dimensions) -> MemoryTerms:
        shape = PrefixShape(base.layers, base.groups, base.head_dim, base.hidden)
        trained = self.pre_seq_len * shape.width
        if self.prefix_projection:
            trained += 2 * shape.width * shape.hidden_size + shape.width + shape.hidden_size
        return MemoryTerms(trained, frozen_base=True, positions=self.pre_seq_len)

    @classmethod
    def is_on(cls, model: nn.Module) -> bool:
        return prefix_of(model) is not None

    @classmethod
    def detach(cls, model: PreTrainedModel) -> None:
        detach_prefix(model)

    @classmethod
    def off(cls, model: PreTrainedModel) -> AbstractContextManager:
        return without_prefix(model)

    @classmethod
    def served(cls, model: PreTrainedModel, name: str) -> Prefix:
        return Prefix.of(name, attached_prefix(model), model.dtype)

    @classmethod
    def store(cls, folder: Path, base: str | Path, store: Path) -> Stored:
        config, checkpoint = read_config(resolve_base(base)), read_prefix(folder)
        if checkpoint.manifest is not None:
            check_belongs(checkpoint.manifest, checkpoint.folder, base, family_of(config).template_name)
        return export_vllm(checkpoint, config, store)

    @classmethod
    def parameters(cls, model: PreTrainedModel) -> Iterable[nn.Parameter]:
        return attached_prefix(model).parameters()

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        return read_prefix(folder).manifest

    @classmethod
    def attach(cls, model: PreTrainedModel, folder: Path, base: str | Path) -> Manifest | None:
        checkpoint = for_base(read_prefix(folder), model.config)
        if checkpoint.manifest is not None:
            check_belongs(checkpoint.manifest, checkpoint.folder, base, family_of(model.config).template_name)
        attach_prefix(model, checkpoint.pre_seq_len, checkpoint.prefix_projection).load_state_dict(checkpoint.tensors)
        return checkpoint.manifest

    def save(self, model: PreTrainedModel, tokenizer, manifest: Manifest | None, target: SaveTarget) -> None:
        encoder = attached_prefix(model)
        with gathered(encoder.parameters()):
            tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in encoder.state_dict().items()}
        if target.writes and manifest is not None:
            save_prefix(target.folder, tensors, manifest)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        attached_prefix(model).load_state_dict(read_prefix(folder).tensors)

    def saved_bytes(self, model: PreTrainedModel) -> int:
        return 4 * sum(whole_shape(parameter).numel() for parameter in attached_prefix(model).parameters())
