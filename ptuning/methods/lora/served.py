"""A LoRA that single rows of a batch are computed with, while the model itself is the bare base.

Shapes: N rows of the batch, S tokens, I and O widths of a linear layer, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.partitioned import gathered
from ptuning.methods.companion import Companion
from ptuning.methods.lora.attach import ADAPTER, lora_layers


@dataclass(frozen=True, eq=False)
class Factors:
    """Of one layer, in fp32.

    Args:
        first: A (r, I).
        second: B (O, r).
        scaling: of their product.
        lengths: (O,) with which DoRA multiplies each output; None without DoRA.
        bias: (O,) of the base's layer, which DoRA leaves alone; None where there is none or no DoRA.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float
    lengths: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, layer) -> "Factors":
        """Of peft's layer. All processes call it: under ZeRO-3 its parts are gathered."""
        with gathered(layer.parameters()), torch.no_grad():
            first, second = (part[ADAPTER].weight.detach().float().clone() for part in (layer.lora_A, layer.lora_B))
            scaling, lengths, bias = layer.scaling[ADAPTER], None, None
            if ADAPTER in layer.lora_magnitude_vector:
                from peft.utils.integrations import dequantize_module_weight  # here, because only a LoRA needs peft

                whole = dequantize_module_weight(layer.get_base_layer())  # the weight itself where it isn't quantised
                changed = whole.float() + scaling * (second @ first)
                lengths = layer.lora_magnitude_vector[ADAPTER].weight.float() / changed.norm(dim=1)
                bias = None if layer.get_base_layer().bias is None else layer.get_base_layer().bias.clone()
        return cls(first, second, scaling, lengths, bias)

    def change(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """What the layer gives with this LoRA, in the order of peft's own arithmetic.

        Args:
            inputs: (N, S, I).
            outputs: (N, S, O), the base's.
        """
        added = nn.functional.linear(nn.functional.linear(inputs.float(), self.first), self.second)
        if self.lengths is None:
            return (outputs + added * self.scaling).to(outputs.dtype)
        product = outputs if self.bias is None else outputs - self.bias
        return (outputs + (self.lengths - 1) * product + self.lengths * added * self.scaling).to(outputs.dtype)


@dataclass(frozen=True, eq=False)
class ServedLora(Companion):
    """A LoRA that requests can be answered with beside others.

    Args:
        name: for the caller.
        layers: full name of a linear layer → its factors.
    """

    name: str
    layers: Mapping[str, Factors]

    @classmethod
    def of(cls, name: str, model: PreTrainedModel) -> "ServedLora":
        """From what is attached to a model."""
        return cls(name, {layer: Factors.of(part) for layer, part in lora_layers(model).items()})

    @contextmanager
    def on(self, model: PreTrainedModel, rows: Sequence[int]) -> Iterator[None]:
        index = torch.tensor(rows, device=model.device)
        hooks = []
        for name, factors in self.layers.items():

            def change(layer, args, outputs, factors=factors):
                outputs[index] = factors.change(args[0][index], outputs[index])
                return outputs

            hooks.append(model.get_submodule(name).register_forward_hook(change))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
