"""Models on attention implementations that this machine can't run as they are."""

from contextlib import ExitStack

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from ptuning.methods.prefix import attention as attention_module


def flash_by_hand(
    query, key, value, attention_mask, query_length, is_causal, dropout, softmax_scale, attn_implementation
):
    """What a flash kernel computes: lower-right causal, grouped heads, a two-dimensional mask that may be shorter than
    a static cache. (B, S, H, D) in and out."""
    assert attn_implementation in ("flash_attention_2", "flash_attention_3")
    assert is_causal and query_length == query.shape[1] and dropout == 0.0
    if attention_mask is not None:
        key, value = key[:, : attention_mask.shape[1]], value[:, : attention_mask.shape[1]]
    groups = query.shape[2] // key.shape[2]
    key, value = (part.transpose(1, 2).repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query.transpose(1, 2) @ key.mT * softmax_scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def load(load_tiny, monkeypatch):
    """`load(implementation)`: the golden model with its prefix on that implementation, runnable on a CPU and without a
    compiler: flex attention uncompiled, flash attention computed by hand."""

    def load(implementation: str, prefix: str | None = "embedding"):
        if implementation == "flex_attention":
            stack.enter_context(torch._dynamo.config.patch(disable=True))
            monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr(attention_module, "_flash_attention_forward", flash_by_hand)
        model = load_tiny(prefix)
        name = implementation if prefix is None else attention_module.prefixed_name(implementation)
        model.config._attn_implementation = name
        return model

    with ExitStack() as stack:
        yield load
