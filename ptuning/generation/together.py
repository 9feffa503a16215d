"""Attention of a step in which running rows take their next tokens and a prompt takes a piece, in one forward call.

All matrix products see one batch of N single tokens: those of r rows, then p of the prompt. Only attention tells them apart:
rows look at their own slots, the piece at the slot behind them, by two calls of the plain kernel.

Shapes: N = r + p tokens, H heads, G key/value groups, C columns, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "together_sdpa"  # in transformers' registry


@dataclass(frozen=True)
class Layout:
    """What attention must know of such a step.

    Args:
        rows: r.
        rows_mask: (r, 1, 1, columns of the rows).
        piece_mask: (1, 1, p, columns of the prompt).
    """

    rows: int
    rows_mask: torch.Tensor
    piece_mask: torch.Tensor


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **kwargs,
):
    """query (N, H, 1, D), key and value (r + 1, G, C, D), all slots in use. Without a layout: the plain kernel."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    r, outputs = layout.rows, []
    piece = query[r:, :, 0].transpose(0, 1)[None]  # (1, H, p, D)
    for part, slots, mask in (
        (query[:r], slice(0, r), layout.rows_mask),
        (piece, slice(r, r + 1), layout.piece_mask),
    ):
        width, mask = mask.shape[3], mask.to(query.device)
        found, _ = sdpa_attention_forward(module, part, key[slots, :, :width], value[slots, :, :width], mask, **kwargs)
        outputs.append(found.flatten(0, 1)[:, None])  # (rows or p, 1, H, D)
    return torch.cat(outputs), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def allow_together(config: PreTrainedConfig) -> bool:
    """Has a model that computes with the plain kernel compute such steps too. Returns whether it can: a family whose kernel adds
    something of its own, such as ALiBi, can't."""
    if config._attn_implementation != "sdpa":
        return False
    config._attn_implementation = NAME
    return True
