"""Positions of real tokens, whichever side the padding is on."""

import torch
from transformers.cache_utils import Cache


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens from 0: (B, S) mask → (B, S) positions."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_where_padded(mask: torch.Tensor | None, length: int, cache: Cache | None) -> torch.Tensor | None:
    """Positions (B, length) of the newest tokens, or None where no mask covers them and everything before them.

    Args:
        mask: (B, S), 1 = real token; or of any other form, which says nothing here.
        length: of the newest tokens.
        cache: with the ones before them.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    if mask is None or mask.ndim != 2 or mask.shape[1] < seen + length:
        return None
    return positions_of(mask)[:, seen : seen + length]
