"""Attention on rows whose positions are divided among processes, each of which has all heads of its own positions.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): before attention the processes exchange what they have, so that each has
all positions of its share of the heads, and after it back. The attention between sees whole rows, whichever it is, and a prefix in
it is cut to the heads that are here (ptuning.distributed.own_heads). Everything else of a layer works on single positions.

Shapes: P processes, B rows, H query heads, G key/value groups, s positions of one process, S = P·s, D head dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

DIVIDED = "_of_positions"  # behind the name of the attention that sees whole rows


class Exchange(torch.autograd.Function):
    """(P, …) → (P, …): part p goes to process p, and part p of the result is what it has sent. A gradient goes back the same way,
    so that with each process's loss a share of one sum, its parameters get their share of that sum's gradient."""

    @staticmethod
    def forward(ctx, parts):
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous())
        return received

    @staticmethod
    def backward(ctx, gradient):
        return Exchange.apply(gradient)


def all_positions(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, H or G, s, D) each → (B, H/P or G/P, S, D) each, in one exchange: all processes must make theirs in the same order."""
    shares = [part.unflatten(1, (dist.get_world_size(), -1)) for part in parts]
    received = Exchange.apply(torch.cat(shares, dim=2).transpose(0, 1))  # (P, B, heads, s, D)
    whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return whole.split([share.shape[2] for share in shares], dim=1)


def all_heads(out: torch.Tensor) -> torch.Tensor:
    """(B, S, H/P, D) → (B, s, H, D)."""
    received = Exchange.apply(out.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1))  # (P, B, s, H/P, D)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _divided(kernel: Callable) -> Callable:
    def attention(module: Any, query, key, value, attention_mask, **kwargs):
        """query (B, H, s, D), key and value (B, G, s, D) while training; in evaluation mode rows are whole."""
        if not module.training:
            return kernel(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None:  # it would be of one process's positions
            raise RuntimeError("attention on divided positions is causal and takes no mask")
        out, _ = kernel(module, *all_positions(query, key, value), None, **kwargs)
        return all_heads(out), None

    return attention


def divide_positions(model: PreTrainedModel) -> None:
    """Makes a model train on rows whose positions are divided among all processes of the process group.

    Each forward call in training mode gets the process's own positions (B, s) and `position_ids` that say which they are. The heads
    and groups must be multiples of the number of processes.

    Args:
        model: with its kernels and with what trains already on it.
    """
    used = model.config._attn_implementation
    # The form without a prefix too: a base is answered with while its prefix is off.
    for name in [name for name in AttentionInterface().valid_keys() if used.endswith(name)]:
        AttentionInterface.register(name + DIVIDED, _divided(AttentionInterface()[name]))
        AttentionMaskInterface.register(name + DIVIDED, AttentionMaskInterface()[name])
    model.config._attn_implementation = used + DIVIDED
