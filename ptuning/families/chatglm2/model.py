"""ChatGLM2 as transformers' own GlmForCausalLM, under the official class name.

Measured against the official implementation: the largest logit difference is 0.0 (see tests/golden). Nothing of the
network is written again here.
"""

import torch
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptuning.families.chatglm2.config import ChatGLMConfig


class ChatGLMForConditionalGeneration(GlmForCausalLM):
    """The official class name, so that `architectures` in config.json means the same on both sides."""

    config_class = ChatGLMConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq", r"prefix_encoder\.")

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """GlmForCausalLM.forward, in which padding on the left doesn't shift positions.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S) or with the cache's length, 1 = real token.
            position_ids: (B, S); real tokens count from 0. Derived from the mask where left out and there is padding.
        """
        if position_ids is None:
            inputs = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            position_ids = _positions_where_padded(attention_mask, inputs.shape[1], kwargs.get("past_key_values"))
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens from 0, whichever side the padding is on: (B, S) mask → (B, S) positions."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _positions_where_padded(mask, length: int, cache) -> torch.Tensor | None:
    """Positions of the newest `length` tokens, or None where no mask covers them and everything before them."""
    seen = 0 if cache is None else cache.get_seq_length()
    if mask is None or mask.ndim != 2 or mask.shape[1] < seen + length:
        return None
    return positions_of(mask)[:, seen : seen + length]
