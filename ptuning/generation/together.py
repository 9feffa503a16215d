"""Attention of a step in which running rows take their next tokens, and perhaps a prompt takes a piece, in one forward call.

All matrix products see one batch of N single tokens: those of r rows, then p of the prompt. Only attention tells them apart:
rows look at their own slots, the piece at the slot behind them, by calls of the plain kernel of their own. Short rows beside
long ones have a call of their own too, so that they aren't computed as wide as these.

Shapes: N = r + p tokens, H heads, G key/value groups, C columns, D head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "together_sdpa"  # in transformers' registry
_CALL = {"cpu": 256}  # columns that take as long as a call of the kernel; on an accelerator that is many:
_CALL_ELSEWHERE = 16384
_UNGROUPED = nn.Module()  # of an attention whose heads have keys each

# query (r, H, 1, D), key and value (r, G, C, D), scaling → (r, 1, H, D)
Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """What attention must know of such a step.

    Args:
        rows: r.
        rows_mask: (r, 1, 1, columns of the rows).
        spans: of rows that the plain kernel computes in one call: first, end, columns.
        piece_mask: (1, 1, p, columns of the prompt), added to scores: sdpa would make that of true and false again in each layer;
            None without one.
        attend: computes the rows, and there are no spans; None: the plain kernel does.
    """

    rows: int
    rows_mask: torch.Tensor
    spans: Sequence[tuple[int, int, int]]
    piece_mask: torch.Tensor | None = None
    attend: Attend | None = None


def spans(widths: Sequence[int], device: torch.device) -> list[tuple[int, int, int]]:
    """Splits rows, in their order, into spans (first, end, columns) so that all calls together take the least.

    Args:
        widths: columns of each row.
        device: where they are computed.
    """
    call, count = _CALL.get(device.type, _CALL_ELSEWHERE), len(widths)
    if count * max(widths) - sum(widths) <= call:
        return [(0, count, max(widths))]
    best: list[tuple[int, int, int]] = [
        (0, 0, 0)
    ]  # of the first n rows: what they cost, and their last span's first and width
    for end in range(1, count + 1):
        width, choices = 0, []
        for first in range(end - 1, -1, -1):
            width = max(width, widths[first])
            choices.append((best[first][0] + call + width * (end - first), first, width))
        best.append(min(choices))
    found, end = [], count
    while end:
        _, first, width = best[end]
        found.append((first, end, width))
        end = first
    return found[::-1]


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
    if layout.attend is not None:
        outputs.append(layout.attend(query[:r], key[:r], value[:r], scaling=kwargs["scaling"]))
    parts = [
        (query[first:end], slice(first, end), layout.rows_mask[first:end, :, :, :width])
        for first, end, width in layout.spans
    ]
    for part, slots, mask in parts:
        width, mask = mask.shape[3], mask.to(query.device)
        found, _ = sdpa_attention_forward(module, part, key[slots, :, :width], value[slots, :, :width], mask, **kwargs)
        outputs.append(found)  # (rows, 1, H, D)
    if layout.piece_mask is not None:
        mask = layout.piece_mask.to(query.device)
        outputs.append(_piece(query[r:], key[r], value[r], mask, **kwargs))
    return torch.cat(outputs), None


def _piece(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **kwargs) -> torch.Tensor:
    """query (p, H, 1, D), key and value (G, C, D) → (p, 1, H, D).

    The heads of a group are given to the kernel as the heads of a row, which read the same keys and values where these are; the
    plain way copies a prompt's whole past for every one of them, in each layer of each step, however small the piece.
    """
    (p, _, _, d), groups, width = query.shape, key.shape[0], mask.shape[3]
    grouped = query.reshape(p, groups, -1, d).permute(1, 2, 0, 3)  # (G, H / G, p, D)
    key, value = (each[:, None, :width].expand(-1, grouped.shape[1], -1, -1) for each in (key, value))
    found, _ = sdpa_attention_forward(_UNGROUPED, grouped, key, value, mask, **kwargs)  # (G, p, H / G, D)
    return found.transpose(0, 1).reshape(p, 1, -1, d)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def allow_together(config: PreTrainedConfig) -> bool:
    """Has a model that computes with the plain kernel compute such steps too. Returns whether it can: a family whose kernel adds
    something of its own, such as ALiBi, can't."""
    if config._attn_implementation != "sdpa":
        return False
    config._attn_implementation = NAME
    return True
