"""RMSNorm and SwiGLU that keep for the backward pass only what it needs; their weights don't train.

Shapes: H numbers a token, F feed-forward width.
"""

from typing import Any

import torch
from torch import nn


class RMSNorm(torch.autograd.Function):
    """y = x r g, with r = (Σx² / H + ε)^(-1/2).

    dx = r (g dy) − x r³ / H · Σ(g dy x). Kept are x, which the residual stream keeps anyway, and r; in 16 bit that is half of what
    plain torch keeps, which needs x in fp32. Sums are in fp32 at least, and rounded where transformers' own norms round.
    """

    @staticmethod
    def forward(ctx, x, weight_H, epsilon):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, r, weight_H)
        return (wide * r).to(x.dtype).mul_(weight_H)

    @staticmethod
    def backward(ctx, dy):
        x, r, weight_H = ctx.saved_tensors
        wide, dn = x.to(r.dtype), (dy * weight_H).to(r.dtype)
        along = torch.linalg.vecdot(dn, wide).unsqueeze(-1).mul_(r).mul_(r).mul_(r).div_(-x.shape[-1])
        return dn.mul_(r).addcmul_(wide, along).to(x.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """h = silu(gate) · up of [gate, up] (…, 2F).

    dup = dh silu(gate), dgate = dh up silu'(gate). Kept is the input alone: silu(gate) is computed again, a third less memory.
    """

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dh):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        gradient = torch.empty_like(gate_up)
        dgate, dup = gradient.chunk(2, -1)
        torch.mul(nn.functional.silu(gate), dh, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=dgate)
        return gradient


class LeanNorm:
    """In front of a family's norm class (`Family.norm`): computes with `RMSNorm` while training."""

    weight: nn.Parameter
    variance_epsilon: float
    training: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        plain: Any = super()
        if not self.training or self.weight.requires_grad or self.weight.dtype != hidden_states.dtype:
            return plain.forward(hidden_states)
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanFeedForward:
    """In front of a family's feed-forward class (`Family.feed_forward`): computes with `SwiGLU` while training."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    training: bool

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        plain: Any = super()
        if not self.training:
            return plain.forward(hidden_states)
        return self.down_proj(SwiGLU.apply(self.gate_up_proj(hidden_states)))
