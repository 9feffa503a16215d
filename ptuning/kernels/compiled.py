"""torch.compile of what a model repeats, once for all its layers, instead of the model as a whole.

Compiled as a whole the layers are written out one after the other, and each is compiled by itself. Here their common `forward` is,
with the lengths of rows left open, so that a second layer and another batch find it made. Attention stays as it is: it is one
kernel of its own already, and the one thing in a layer that depends on which layer it is (a prefix has keys for each).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental import _config as shapes
from transformers import AttentionInterface, PreTrainedModel

_made: dict[tuple[type, str | Callable, str | None], Callable] = {}


class CompiledLayer:
    """In front of a layer's class: computes compiled while training, where its input has a gradient.

    Else it is the layer's own: an answer's growing cache would compile it anew, and so would the first layer of a frozen base, to
    whose input nothing goes back.
    """

    training: bool
    compiled: Callable

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain: Any = super()
        if self.training and hidden_states.requires_grad:
            # As many rows as heads in the first batch are so by chance.
            with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return self.compiled(self, hidden_states, *args, **kwargs)
        return plain.forward(hidden_states, *args, **kwargs)


def compiled_forward(kind: Any, backend: str | Callable, mode: str | None) -> Callable:
    """The one compiled `forward` of all layers of a class: (layer, …) → what the layer's own returns."""
    key = kind, backend, mode
    if key not in _made:
        _made[key] = torch.compile(kind.forward, dynamic=True, backend=backend, mode=mode)
    return _made[key]


def leave_attention_apart(model: PreTrainedModel) -> None:
    """Makes compiled layers call the attention that a model uses, instead of compiling it. Elsewhere it is what it was."""
    name, registry = model.config._attn_implementation, AttentionInterface()
    if name in registry.valid_keys() and not getattr(registry[name], "_torchdynamo_disable", False):
        AttentionInterface.register(name, torch.compiler.disable(registry[name]))
