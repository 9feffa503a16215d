"""What GLM's blank filling says of a row, found in its ids: which tokens are context, and where what is written stands.

A row is context, sop, what is written. The context has a blank in it: [gMASK] (go on behind everything), or [MASK] or [sMASK]
(a short blank). Every token sees the whole context; behind it tokens see what stands before them. For [gMASK] positions
count on; for a short blank sop and everything behind it have the blank's own position.

Source: THUDM/GLM-130B `generate.py`, `get_masks_and_position_ids`. Shapes: B rows, S tokens, K columns of the keys.
"""

from collections.abc import Mapping

import torch

from ptuning.families.glm130b.config import MASK, SHORT_MASK
from ptuning.families.positions import positions_of


def context_lengths(ids: torch.Tensor, tokens: Mapping[str, int]) -> torch.Tensor:
    """(B,) columns before the first sop, padding included; 0 where there is none: such a row is read from left to right.

    Args:
        ids: (B, S), from the row's first column on.
        tokens: of the configuration.
    """
    return _first(ids, tokens["sop"], missing=0)


def blank_positions(ids: torch.Tensor, mask: torch.Tensor | None, tokens: Mapping[str, int]) -> torch.Tensor:
    """Positions (B, S) of whole rows; real tokens count from 0.

    Args:
        ids: (B, S), from the row's first column on.
        mask: (B, S), 1 = real token; None, or one of another form: there is no padding.
        tokens: of the configuration.
    """
    counted = real_positions(mask, ids)
    column = torch.arange(ids.shape[1], device=ids.device)
    start = _first(ids, tokens["sop"], missing=ids.shape[1])
    blank = torch.full_like(start, -1)
    for name in (SHORT_MASK, MASK):  # the second wins
        if name in tokens:
            found = _first(ids, tokens[name], missing=-1)
            blank = torch.where((found >= 0) & (found < start), found, blank)
    written = (column >= start[:, None]) & (blank >= 0)[:, None]
    return torch.where(written, counted.gather(1, blank.clamp(min=0)[:, None]), counted)


def real_positions(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """(B, S) of real tokens from 0, whatever they are.

    Args:
        mask: as of `blank_positions`.
        like: (B, S).
    """
    return positions_of(mask if mask is not None and mask.ndim == 2 else torch.ones_like(like))


def open_context(causal: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A causal mask in which every query sees the whole context as well.

    Args:
        causal: (B or 1, 1, S, K), true where a query sees a key; or 0 there, and less elsewhere.
        lengths: (B,) of `context_lengths`.

    Returns:
        (B, 1, S, K), true where a query sees a key. Columns that no query saw (padding, unused cache) stay unseen.
    """
    visible = causal if causal.dtype == torch.bool else causal >= 0
    in_context = torch.arange(visible.shape[-1], device=visible.device) < lengths[:, None]
    return visible | (in_context[:, None, None] & visible.any(-2, keepdim=True))


def _first(ids: torch.Tensor, token: int, missing: int) -> torch.Tensor:
    """(B,) the column of the first such token, `missing` where there is none."""
    found = ids == token
    return torch.where(found.any(-1), found.long().argmax(-1), missing)
