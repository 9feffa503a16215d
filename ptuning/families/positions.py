"""Positions of real tokens, whichever side the padding is on."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


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


class CountsRealTokens:
    """In front of one of transformers' causal models: padding on the left doesn't shift positions."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The model's own, with positions derived from the mask where they are left out and there is padding.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S) or with the cache's length, 1 = real token.
            position_ids: (B, S); real tokens count from 0.
        """
        if position_ids is None:
            inputs = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            position_ids = positions_where_padded(attention_mask, inputs.shape[1], kwargs.get("past_key_values"))
        plain: Any = super()
        return plain.forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
