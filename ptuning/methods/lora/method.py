"""LoRA as a method: peft's low-rank factors on a frozen base."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.base import read_base_config, resolve_base
from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.partitioned import gathered, whole_shape
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families import Dimensions, family_of, read_config
from ptuning.messages import message
from ptuning.methods.lora.attach import (
    ADAPTER,
    attach_lora,
    detach_lora,
    lora_layers,
    lora_parameters,
    without_lora,
)
from ptuning.methods.lora.checkpoint import LORA, LoraCheckpoint, for_base, is_lora, read_lora, save_lora
from ptuning.methods.lora.export import export_vllm
from ptuning.methods.lora.served import ServedLora
from ptuning.methods.lora.settings import ALPHA, DROPOUT, RANK, TARGET, LoraSettings
from ptuning.methods.lora.targets import choose, linears, linears_of, shortened
from ptuning.methods.method import MemoryTerms, Method, SaveTarget, check_belongs
from ptuning.methods.registry import add_method
from ptuning.methods.store import Stored
from ptuning.packages import require
from ptuning.quantization import Precision, precision_in

_DORA_IN_FILES, _DORA = ".lora_magnitude_vector", f".lora_magnitude_vector.{ADAPTER}.weight"


@add_method
class LoraMethod(Method):
    """Trains two thin factors beside each of some linear layers.

    Args:
        settings: rank, scale and so on.
        target: the layers in the words they were given in.
        widths: (in, out) of each layer meant, by full name.
    """

    name = LORA
    noun = "LoRA"
    learning_rate = 1e-3
    keeps_base = True
    merges = True
    options = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_dora", "use_rslora", "lora_init")
    defaults: ClassVar[dict[str, Any]] = {
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "lora_target": TARGET,
    }

    def __init__(self, settings: LoraSettings, target: Sequence[str], widths: dict[str, tuple[int, int]]):
        require("--method lora", "peft", "ptuning[peft]", instead="tune a prefix (--method prefix)")
        largest = max(min(width) for width in widths.values())
        if settings.lora_rank > largest:
            raise ConfigError(
                f"--lora_rank is {settings.lora_rank}; use at most {largest}, which no weight of this base has a higher rank than"
            )
        self.lora, self.target, self.widths = settings, list(target), widths

    @classmethod
    def from_options(cls, options: Any) -> "LoraMethod":
        if options.ptuning_checkpoint is None:
            settings, checkpoint = LoraSettings.of_options(options), None
        else:
            checkpoint = read_lora(options.ptuning_checkpoint)
            settings = checkpoint.settings.continued(options, checkpoint.folder)
        folder = resolve_base(options.model_name_or_path)
        read_base_config(folder)
        config = read_config(folder)
        layers = linears_of(config)
        if checkpoint is None:
            target = _words(options.lora_target or [TARGET])
            chosen = choose(target, layers, config)
        else:
            tensors = for_base(checkpoint, layers, config)[1]
            chosen = [name for name in layers if f"{name}.lora_A.weight" in tensors]
            target = shortened(chosen, layers)
            asked = options.lora_target
            if asked is not None and set(choose(_words(asked), layers, config)) != set(chosen):
                raise CheckpointError(
                    f"{checkpoint.folder}: lora_target is {' '.join(target)} in the checkpoint and {' '.join(asked)} was asked "
                    "for; leave lora_target out, it is read from the checkpoint."
                )
        return cls(settings, target, {name: (layers[name].in_features, layers[name].out_features) for name in chosen})

    def describe(self) -> str:
        kind = "DoRA" if self.lora.use_dora else "rsLoRA" if self.lora.use_rslora else "LoRA"
        return message("lora_of", kind=kind, rank=self.lora.lora_rank, target=" ".join(self.target))

    def settings(self) -> dict[str, Any]:
        return self.lora.to_dict() | {"lora_target": self.target}

    def start(self, model: PreTrainedModel) -> None:
        if layers := lora_layers(model):  # it goes on from a checkpoint's
            for layer in layers.values():
                dropout, p = layer.lora_dropout, self.lora.lora_dropout
                dropout[ADAPTER] = nn.Dropout(p) if p else nn.Identity()
                dropout.train(model.training)
            model.peft_config[ADAPTER].lora_dropout = self.lora.lora_dropout
            for parameter in lora_parameters(model).values():
                parameter.requires_grad_(True)
            return
        target = shortened(list(self.widths), linears(model))
        attach_lora(model, _peft_config(self.lora.to_peft() | {"target_modules": target}, model))

    def memory(self, base: Dimensions) -> MemoryTerms:
        rank, widths, dora = self.lora.lora_rank, self.widths.values(), self.lora.use_dora
        trained = sum(rank * (wide + out) + dora * out for wide, out in widths)
        kept = sum(wide + rank + dora * 2 * out for wide, out in widths)
        dropped = sum(wide for wide, _ in widths) if self.lora.lora_dropout else 0
        return MemoryTerms(trained, frozen_base=True, inputs=kept, dropped=dropped)

    def refusal(self, precision: Precision) -> str | None:
        return _refusal(self.lora, precision)

    @classmethod
    def is_on(cls, model: nn.Module) -> bool:
        return bool(lora_layers(model))

    @classmethod
    def detach(cls, model: PreTrainedModel) -> None:
        detach_lora(model)

    @classmethod
    def off(cls, model: PreTrainedModel) -> AbstractContextManager:
        return without_lora(model)

    @classmethod
    def served(cls, model: PreTrainedModel, name: str) -> ServedLora:
        return ServedLora.of(name, model)

    @classmethod
    def store(cls, folder: Path, base: str | Path, store: Path) -> Stored:
        config, checkpoint = read_config(resolve_base(base)), read_lora(folder)
        if checkpoint.manifest is not None:
            check_belongs(checkpoint.manifest, checkpoint.folder, base, family_of(config).template_name)
        return export_vllm(checkpoint, config, store, str(base))

    @classmethod
    def merge(cls, model: PreTrainedModel) -> None:
        for name, layer in lora_layers(model).items():
            if not layer.get_base_layer().weight.is_floating_point():
                raise ConfigError(
                    f"--merge: {name} is quantised, and rounded weights can't take a LoRA; give the 16-bit base"
                )
            layer.merge()
        detach_lora(model)

    @classmethod
    def parameters(cls, model: PreTrainedModel) -> Iterable[nn.Parameter]:
        return lora_parameters(model).values()

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return is_lora(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        return read_lora(folder).manifest

    @classmethod
    def attach(cls, model: PreTrainedModel, folder: Path, base: str | Path) -> Manifest | None:
        require("a LoRA", "peft", "ptuning[peft]")
        checkpoint = read_lora(folder)
        if checkpoint.manifest is not None:
            check_belongs(checkpoint.manifest, checkpoint.folder, base, family_of(model.config).template_name)
        detach_lora(model)
        stored = precision_in(model.config)
        if stored is not None and (refusal := _refusal(checkpoint.settings, stored)) is not None:
            raise CheckpointError(f"{checkpoint.folder}: {refusal}")
        arguments, tensors = for_base(checkpoint, linears(model), model.config)
        attach_lora(model, _peft_config(arguments, model))
        _load(model, tensors, checkpoint)
        return checkpoint.manifest

    def save(self, model: PreTrainedModel, tokenizer, manifest: Manifest | None, target: SaveTarget) -> None:
        parameters = lora_parameters(model)
        with gathered(parameters.values()):
            tensors = {_in_files(name): tensor.detach().float().cpu().clone() for name, tensor in parameters.items()}
        if target.writes and manifest is not None:
            save_lora(target.folder, model.peft_config[ADAPTER], tensors, manifest)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        checkpoint = read_lora(folder)
        _load(model, checkpoint.tensors, checkpoint)

    def saved_bytes(self, model: PreTrainedModel) -> int:
        return 4 * sum(whole_shape(parameter).numel() for parameter in lora_parameters(model).values())


def _refusal(settings: LoraSettings, precision: Precision) -> str | None:
    if not settings.use_dora or precision.readable:
        return None
    return (
        f"DoRA needs the length of each row of the base's matrices, and peft can't compute it where they are {precision.name}; use "
        "LoRA (without --use_dora), --quantization nf4, or the 16-bit base"
    )


def _words(target: str | Sequence[str]) -> list[str]:
    words = [target] if isinstance(target, str) else target
    return [part for word in words for part in word.replace(",", " ").split()]


def _peft_config(arguments: dict[str, Any], model: PreTrainedModel) -> Any:
    from peft import LoraConfig  # here, because nothing else needs peft

    return LoraConfig(base_model_name_or_path=model.config.name_or_path or None, **arguments)


def _in_files(name: str) -> str:
    return name.replace(_DORA, _DORA_IN_FILES).replace(f".{ADAPTER}.", ".")


def _load(model: PreTrainedModel, tensors: dict[str, torch.Tensor], checkpoint: LoraCheckpoint) -> None:
    own = {_in_files(name): parameter for name, parameter in lora_parameters(model).items()}
    differing = list(own.keys() ^ tensors.keys())
    differing += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors don't fit adapter_config.json or this base (the first of {len(differing)}: "
            f"{min(differing)}); copy the folder again, or give the base it was trained on."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
