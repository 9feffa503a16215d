"""Causal attention behind a prefix without a mask, so that memory grows with the row's length and not with its square.

Shapes: B rows, H query heads, G key/value groups, S positions, T prefix positions, D head dimension.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

# Of torch's own CPU attention: what scaled_dot_product_attention calls, here with the log-sum-exp that it gives besides.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SplitAttention(torch.autograd.Function):
    """softmax(Q [Kp, K]ᵀ · scale + causal) [Vp, V] as two attentions that need no mask, one on the prefix and one causal.

    With o₁, o₂ their results and l₁, l₂ the logarithms of their softmax sums: l = log(e^l₁ + e^l₂), o = e^(l₁-l) o₁ + e^(l₂-l) o₂.
    Given the whole's o and l, either part's backward pass computes its share of the gradients, because probabilities are
    e^(score - l) whichever keys stand beside. Keys and values stay grouped, none is repeated or copied.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, scale):
        causal, causal_sum = _forward(query, key, value, 0.0, True, scale=scale)
        beside, beside_sum = _forward(query, prefix_key, prefix_value, 0.0, False, scale=scale)
        total = torch.logaddexp(causal_sum, beside_sum)
        out = causal * (causal_sum - total).exp_()[..., None]
        out = out.addcmul_(beside, (beside_sum - total).exp_()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, total)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, prefix_key, prefix_value, out, total = ctx.saved_tensors
        rest = (out, total, 0.0)
        dquery, dkey, dvalue = None, None, None
        beside, dprefix_key, dprefix_value = _backward(
            gradient, query, prefix_key, prefix_value, *rest, False, scale=ctx.scale
        )
        if any(ctx.needs_input_grad[:3]):  # not in the first layer of a frozen base
            dquery, dkey, dvalue = _backward(gradient, query, key, value, *rest, True, scale=ctx.scale)
            dquery += beside
        return dquery, dkey, dvalue, dprefix_key, dprefix_value, None


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of a whole row on itself and on a prefix.

    Args:
        query: (B, H, S, D).
        key: (B, G, S, D), as `value`.
        prefix_key: (B, G, T, D), as `prefix_value`.
        scale: of the scores; default: D^(-1/2).

    Returns:
        (B, H, S, D).
    """
    return SplitAttention.apply(query, key, value, prefix_key, prefix_value, scale)


def splits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, dropout: float) -> bool:
    """Whether `split_attention` computes what is asked for: whole rows, padded at most on the right, without dropout, on a CPU."""
    whole = mask is None and query.shape[2] == key.shape[2] > 1 and not dropout
    kind = query.dtype if query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled("cpu") else None
    return whole and query.device.type == "cpu" and kind in (torch.float32, torch.float64, torch.bfloat16)


def takes_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel for GPUs computes this, keys and values grouped (B, G, K, D): in 16 bit, on cards with it."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, True))
