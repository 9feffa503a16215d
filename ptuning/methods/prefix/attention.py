"""Attention that also sees a prefix, as named implementations in transformers' attention registry.

The prefix stays out of the KV cache: gradient checkpointing drops caches silently, and a prefix in the cache would shift
positions. Instead every layer prepends the prefix's keys and values right before the attention kernel, and pads the
mask by T on the left so that every token sees the whole prefix.

Shapes: B rows, H query heads, G key/value groups, S query positions, K key positions, T prefix positions, D head dimension.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from ptuning.distributed import own_heads
from ptuning.families import family_of
from ptuning.kernels.attention import split_attention, splits, takes_groups
from ptuning.kernels.swap import SPLIT
from ptuning.methods.prefix.encoder import PrefixKeyValues

PREFIXED = "prefix_"


def prefixed_name(implementation: str) -> str:
    """The registered name of an attention implementation that sees the prefix, e.g. `sdpa` → `prefix_sdpa`."""
    return implementation if implementation.startswith(PREFIXED) else PREFIXED + implementation


def seeing_prefix(implementation: str) -> str:
    """As `prefixed_name`; an implementation that a family has added gets its form that sees the prefix first."""
    name = prefixed_name(implementation)
    if name not in AttentionInterface().valid_keys():
        AttentionInterface.register(name, _with_prefix(AttentionInterface()[implementation]))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    return name


def _flash_attention(implementation: str) -> Callable:
    # transformers' own wrapper picks the kernel by the config's implementation name, which here is the prefixed one.
    def forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        out = _flash_attention_forward(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            query_length=query.shape[2],
            is_causal=True,
            dropout=dropout,
            softmax_scale=scaling,
            attn_implementation=implementation,
        )
        return out, None

    return forward


def _pad_mask(mask: torch.Tensor | BlockMask | None, query: torch.Tensor, prefix_length: int, key_length: int):
    if mask is None:
        if query.shape[2] == 1:
            return None
        if query.is_cuda:  # lets torch choose its flash kernel, whose causal rule is the lower right one
            return causal_lower_right(query.shape[2], prefix_length + key_length)
        ones = torch.ones(query.shape[2], prefix_length + key_length, dtype=torch.bool, device=query.device)
        return ones.tril(prefix_length + key_length - query.shape[2])
    if isinstance(mask, BlockMask):
        return _pad_block_mask(mask, prefix_length)
    padded = getattr(mask, "_with_prefix", None)  # all layers share one mask, as below
    if padded is None or padded.shape[-1] != prefix_length + mask.shape[-1]:
        own = mask[:1] if mask.stride(0) == 0 else mask  # rows that share one still do, which spares memory
        padded = nn.functional.pad(own, (prefix_length, 0), value=True if mask.dtype == torch.bool else 0.0)
        padded = padded.expand(len(mask), *[-1] * (mask.ndim - 1))
        if not torch.compiler.is_compiling():
            mask._with_prefix = padded  # type: ignore[attr-defined]
    return padded


def _pad_block_mask(mask: BlockMask, prefix_length: int) -> BlockMask:
    padded = getattr(mask, "_with_prefix", None)  # all layers share one mask, so build its padded form once
    if padded is None:
        inner = mask.mask_mod

        def mask_mod(b, h, q, kv):
            # Indices are clamped because both sides of `|` are evaluated, also for the prefix's columns.
            return (kv < prefix_length) | inner(b, h, q, (kv - prefix_length).clamp(min=0))

        q_length, kv_length = mask.seq_lengths
        padded = create_block_mask(
            mask_mod, mask.shape[0], None, q_length, kv_length + prefix_length, device=mask.kv_num_blocks.device
        )
        mask._with_prefix = padded  # type: ignore[attr-defined]  # kept on the mask, so that it lives as long
    return padded


def _flex_mask(*, q_offset: torch.Tensor | int = 0, **kwargs) -> BlockMask:
    # A static cache counts in place, and a block mask reads its offset only inside attention, after the update.
    return flex_attention_mask(q_offset=q_offset.clone() if torch.is_tensor(q_offset) else q_offset, **kwargs)


def _sdpa(module: Any, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' own; but behind a causal bias, before which it would repeat the keys for every query head of their group (16
    times in ChatGLM2-6B), they stay as they are where torch's flash kernel takes them so."""
    if not isinstance(attention_mask, CausalBias) or not takes_groups(query, key, value, dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _eager(module: nn.Module, *args, **kwargs):
    """The eager kernel of the module's own family."""
    return family_of(module.config).eager_attention(module, *args, **kwargs)


def _of_layer(prefix: PrefixKeyValues, module: Any, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's prefix, (B, G, T, D) each, in the dtype of the keys (B, G, K, D)."""
    own_key, own_value = (
        own_heads(part, key.shape[1], 1).to(key.device, key.dtype).expand(len(key), -1, -1, -1)
        for part in prefix[module.layer_idx]
    )
    return own_key, own_value


def _with_prefix(kernel: Callable, *, mask_is_2d: bool = False) -> Callable:
    def attention(
        module: Any,  # an attention layer of any model
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None,
        prefix: PrefixKeyValues | None = None,
        **kwargs,
    ):
        """query (B, H, S, D), key and value (B, G, K, D); `prefix` holds this layer's (B or 1, G, T, D) pair."""
        if prefix is not None:
            q_length = query.shape[2]
            prefix_key, prefix_value = _of_layer(prefix, module, key)
            if not mask_is_2d and attention_mask is None and q_length > 1 and key.shape[2] > q_length:
                # Prefill of a static cache without a mask: what lies behind the query is empty cache. (A flash kernel
                # gets no mask either when tokens are added to a filled cache, whose keys all count.)
                key, value = key[:, :, :q_length], value[:, :, :q_length]
            key_length, prefix_length = key.shape[2], prefix_key.shape[2]
            key = torch.cat((prefix_key, key), dim=2)
            value = torch.cat((prefix_value, value), dim=2)
            if not mask_is_2d:
                attention_mask = _pad_mask(attention_mask, query, prefix_length, key_length)
            elif isinstance(attention_mask, torch.Tensor):
                attention_mask = nn.functional.pad(attention_mask, (prefix_length, 0), value=1)
        return kernel(module, query, key, value, attention_mask, **kwargs)

    return attention


def _with_prefix_beside(masked: Callable) -> Callable:
    """Attention that leaves the prefix apart while whole rows are trained on; for the rest `masked`, which puts it in front."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prefix: PrefixKeyValues | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs,
    ):
        if not module.training or prefix is None or not splits(query, key, value, attention_mask, dropout):
            return masked(
                module, query, key, value, attention_mask, prefix=prefix, dropout=dropout, scaling=scaling, **kwargs
            )
        return split_attention(query, key, value, *_of_layer(prefix, module, key), scaling).transpose(1, 2), None

    return attention


def register() -> None:
    """Adds `prefix_eager`, `prefix_sdpa`, `prefix_flex_attention` and `prefix_flash_attention_{2,3}` to transformers;
    and `prefix_sdpa_split`, which needs no mask while whole rows are trained on."""
    implementations = {
        "eager": (_with_prefix(_eager), eager_mask),
        "sdpa": (_with_prefix(_sdpa), sdpa_mask),
        "flex_attention": (_with_prefix(flex_attention_forward), _flex_mask),
    }
    for name in ("flash_attention_2", "flash_attention_3"):
        implementations[name] = (_with_prefix(_flash_attention(name), mask_is_2d=True), flash_attention_mask)
    implementations["sdpa" + SPLIT] = (_with_prefix_beside(implementations["sdpa"][0]), sdpa_mask)
    for name, (forward, mask) in implementations.items():
        AttentionInterface.register(prefixed_name(name), forward)
        AttentionMaskInterface.register(prefixed_name(name), mask)
