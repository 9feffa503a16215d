"""ChatGLM2 as transformers' own GlmForCausalLM, plus a prefix and a loss that only computes what it needs.

Measured against the official implementation: the largest logit difference is 0.0 (see tests/golden). Nothing of the
network is written again here.
"""

from typing import Literal

import torch
from torch import nn
from transformers import GlmForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptuning.methods.prefix.attention import PREFIXED, prefixed_name
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixKeyValues, PrefixShape


class ChatGLMForConditionalGeneration(GlmForCausalLM):
    """The official class name, so that `architectures` in config.json means the same on both sides.

    `prefix_encoder` is None on a base model. `attach_prefix` sets it, and then every forward and `generate` sees it.
    """

    config_class = ChatGLMConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_pos_emb\.inv_freq", r"prefix_encoder\.")

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.prefix_encoder: PrefixEncoder | None = None

    def attach_prefix(self, pre_seq_len: int, prefix_projection: bool = False) -> PrefixEncoder:
        """Gives the model a freshly initialised prefix on the model's device and freezes everything else.

        Args:
            pre_seq_len: T.
            prefix_projection: the reparametrised variant.
        """
        return self.attach_encoder(PrefixEncoder(PrefixShape.of(self.config), pre_seq_len, prefix_projection))

    def attach_encoder(self, encoder: PrefixEncoder) -> PrefixEncoder:
        """Attaches an existing prefix, such as one that `detach_prefix` returned, and freezes everything else."""
        self.requires_grad_(False)
        self.prefix_encoder = encoder.to(self.device).train(self.training).requires_grad_(True)
        self.config._attn_implementation = prefixed_name(self.config._attn_implementation)
        return encoder

    def detach_prefix(self) -> PrefixEncoder | None:
        """Takes the prefix off again and returns it; the model is then the bare base."""
        encoder, self.prefix_encoder = self.prefix_encoder, None
        self.config._attn_implementation = self.config._attn_implementation.removeprefix(PREFIXED)
        return encoder

    def save_pretrained(self, save_directory, state_dict: dict[str, torch.Tensor] | None = None, **kwargs) -> None:
        """Writes the base in the official format. An attached prefix has its own checkpoint and is left out, because
        vLLM and the official loader stumble over left-over prefix tensors."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        base = {key: tensor for key, tensor in state_dict.items() if not key.startswith("prefix_encoder.")}
        super().save_pretrained(save_directory, state_dict=base, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        prefix: PrefixKeyValues | None = None,
        loss_only: bool | Literal["rows"] = False,
        logits_at: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """GlmForCausalLM.forward with a prefix.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S) or with the cache's length, 1 = real token; the prefix is not part of it.
            position_ids: (B, S); real tokens count from 0. Derived from the mask where left out and there is padding.
            labels: (B, S), -100 where there is no loss.
            prefix: key/value pairs to use instead of the attached prefix; an empty list: none.
            loss_only: compute logits and loss only where there are labels and return no logits. "rows": the loss is
                (B,), each row's sum over its labels, and num_items_in_batch isn't used.
            logits_at: (B,) compute the logits of one position a row only, and return them as (B, V).
            num_items_in_batch: number of labels to divide the summed loss by (the whole accumulated batch); default:
                those of this batch.
        """
        inputs = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        if prefix is None and self.prefix_encoder is not None:
            prefix = self.prefix_encoder(inputs.shape[0], self.dtype)
        if prefix:
            if not self.config._attn_implementation.startswith(PREFIXED):
                raise RuntimeError(
                    f"attention implementation '{self.config._attn_implementation}' would ignore the prefix; "
                    f"set it to '{prefixed_name(self.config._attn_implementation)}'"
                )
            kwargs["prefix"] = prefix
        if position_ids is None:
            position_ids = _positions_where_padded(attention_mask, inputs.shape[1], kwargs.get("past_key_values"))
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if logits_at is not None:
            hidden_BSH = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            rows = torch.arange(len(hidden_BSH), device=hidden_BSH.device)
            return CausalLMOutputWithPast(logits=self.lm_head(hidden_BSH[rows, logits_at]))
        if not loss_only:
            if labels is not None:
                kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return super().forward(input_ids=input_ids, **kwargs)
        hidden_BSH = self.model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
        loss = self._loss_where_labels(hidden_BSH, labels, num_items_in_batch, per_row=loss_only == "rows")
        return CausalLMOutputWithPast(loss=loss)

    def _loss_where_labels(self, hidden_BSH, labels_BS, num_items_in_batch, per_row: bool) -> torch.Tensor:
        """Token cross entropy in fp32. On ADGEN labels cover about 60 % of the positions, so 40 % of the largest
        matrix product is saved, and logits of the prompt are never held in memory."""
        shifted = labels_BS[:, 1:]
        chosen = shifted != -100
        logits_NV = self.lm_head(hidden_BSH[:, :-1][chosen]).float()
        targets_N = shifted[chosen]
        if per_row:
            losses_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
            return losses_N.new_zeros(shifted.shape).masked_scatter(chosen, losses_N).sum(1)
        if num_items_in_batch is None:
            num_items_in_batch = max(targets_N.numel(), 1)  # no labels: loss 0 and zero gradients instead of NaN
        return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / num_items_in_batch


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens from 0, whichever side the padding is on: (B, S) mask → (B, S) positions."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _positions_where_padded(mask, length: int, cache) -> torch.Tensor | None:
    """Positions of the newest `length` tokens, or None where no mask covers them and everything before them."""
    seen = 0 if cache is None else cache.get_seq_length()
    if mask is None or mask.ndim != 2 or mask.shape[1] < seen + length:
        return None
    return positions_of(mask)[:, seen : seen + length]
