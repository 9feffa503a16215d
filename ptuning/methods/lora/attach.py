"""Puts a LoRA on a model and takes it off: peft's layers stand in for the base's linear layers, which they hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptuning.errors import CheckpointError
from ptuning.quantization import is_packed

ADAPTER = "default"  # peft's name for the one that is attached


def attach_lora(model: PreTrainedModel, config: Any) -> None:
    """Gives the model freshly initialised factors, in fp32 whatever the base is, and freezes everything else.

    Args:
        config: peft.LoraConfig.

    Raises:
        CheckpointError: it needs what the base doesn't keep.
    """
    from peft import inject_adapter_in_model  # here, because only a LoRA needs peft

    detach_lora(model)
    if config.use_dora and is_packed(model):
        raise CheckpointError(
            "a DoRA needs the numbers of its base, which fast CPU kernels don't keep; give --cpu_kernels exact"
        )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model, ADAPTER)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()  # 16 bit would lose the small updates
    model.train(model.training)  # peft's layers come in training mode, with dropout


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the full names of the linear layers they stand for; empty on a bare base."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors (and DoRA's lengths) by their names in the model."""
    names = lora_layers(model)
    found = {}
    for name, layer in names.items():
        for part, parameter in layer.named_parameters():
            if not part.startswith("base_layer."):
                found[f"{name}.{part}"] = parameter
    return found


def detach_lora(model: nn.Module) -> None:
    """Puts the base's own layers back; the model is then the bare base."""
    for name, layer in lora_layers(model).items():
        _put(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the bare base."""
    layers, config = lora_layers(model), getattr(model, "peft_config", None)
    detach_lora(model)
    try:
        yield
    finally:
        for name, layer in layers.items():
            _put(model, name, layer.train(model.training))
        if config is not None:
            model.peft_config = config


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
