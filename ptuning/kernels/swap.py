"""Gives a model these kernels. The one place that changes what modules of transformers compute.

A module's class is changed to a subclass of it: weights, names, hooks and the `isinstance` questions of peft and transformers stay
as they were, and so does everything in evaluation mode. A registry of transformers offers that for attention alone.
"""

from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptuning.families import family_of
from ptuning.kernels.elementwise import LeanFeedForward, LeanNorm
from ptuning.kernels.product import ONEDNN, FrozenLinear

# Behind the name of the attention implementation. `sdpa_split` is sdpa itself, which without a prefix needs no mask; a prefix
# registers its own form (methods/prefix/attention.py).
SPLIT = "_split"
AttentionInterface.register("sdpa" + SPLIT, sdpa_attention_forward)
AttentionMaskInterface.register("sdpa" + SPLIT, sdpa_mask)


def swap(model: PreTrainedModel, product: str) -> None:
    """Makes a model whose base is frozen compute with these kernels while it trains.

    Args:
        model: with what trains already on it; what comes later keeps its own classes.
        product: of `products()`, for the frozen linear layers.
    """
    family = family_of(model.config)
    for module in model.modules():
        kind = type(module)
        if kind is family.norm:
            module.__class__ = _lean(LeanNorm, kind)
        elif kind is family.feed_forward and family.gates_with_silu(model.config):
            module.__class__ = _lean(LeanFeedForward, kind)
        elif kind is nn.Linear and product == ONEDNN and not any(p.requires_grad for p in module.parameters()):
            module.__class__ = FrozenLinear
    attention = model.config._attn_implementation
    if attention + SPLIT in AttentionInterface().valid_keys():  # not where a family brings an attention of its own
        model.config._attn_implementation = attention + SPLIT


_made: dict[tuple[type, type], Any] = {}


def _lean(kernel: type, kind: type) -> Any:
    """The class `kind` that computes with `kernel` while training."""
    if (kernel, kind) not in _made:
        _made[kernel, kind] = type(f"Lean{kind.__name__}", (kernel, kind), {"__doc__": kernel.__doc__})
    return _made[kernel, kind]
