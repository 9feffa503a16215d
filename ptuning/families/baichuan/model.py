"""Baichuan as transformers' own LlamaForCausalLM: ALiBi, the normalised output layer, and the official weight names.

Measured against the official implementation: the largest logit difference is 0.0 (see tests/golden). Nothing of the
network is written again here.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter

from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.positions import CountsRealTokens

_FUSED = ".self_attn.W_pack."  # rows of q, k and v stacked
_PARTS = tuple(f".self_attn.{part}_proj." for part in "qkv")


class NormHead(nn.Linear):
    """Baichuan2's output layer: each row of the weight is divided by its length. The official code does that for good at the
    first evaluation; here the weight stays as it is stored, so that evaluating changes nothing that is trained or saved."""

    @property
    def effective_weight(self) -> torch.Tensor:
        """(V, H) that inputs are multiplied by."""
        return nn.functional.normalize(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.effective_weight)


class _NoRotary(nn.Module):
    """In place of the rotary embedding, which ALiBi needs none of: cos 1 and sin 0, (B, S, D) each."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*position_ids.shape, self.head_dim)
        return x.new_ones(shape), x.new_zeros(shape)


class BaichuanForCausalLM(CountsRealTokens, LlamaForCausalLM):
    """The official class name, so that `architectures` in config.json means the same on both sides. ALiBi counts positions by
    the mask alone."""

    config_class = BaichuanConfig
    config: BaichuanConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq", r"prefix_encoder\.")

    def __init__(self, config: BaichuanConfig):
        config._attn_implementation = config._attn_implementation or "sdpa"  # transformers' default, with ALiBi
        super().__init__(config)
        if not config.is_rotary:
            self.model.rotary_emb = _NoRotary(config.head_dim)
        if config.has_norm_head:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()


def register_weight_names(model_type: str) -> None:
    """Declares the mapping for `model_type`: all names but the fused one are Llama's."""
    fused = WeightConverter(_FUSED.strip("."), [part.strip(".") for part in _PARTS], [Split(0)])
    register_checkpoint_conversion_mapping(model_type, [fused], overwrite=True)


def official_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Official tensor name → names of the model's tensors whose rows, stacked, are that tensor.

    Args:
        names: of the base's parameters, without what a method has added.
    """
    query, *others = _PARTS
    sources = {}
    for name in names:
        if query in name:
            sources[name.replace(query, _FUSED)] = tuple(name.replace(query, part) for part in _PARTS)
        elif not any(part in name for part in others):
            sources[name] = (name,)
    return sources
