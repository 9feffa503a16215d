"""The loss of a frozen output layer without its logits: in chunks of labels, each with its gradient.

On a GPU liger-kernel's loss, where it is installed, does the same in one kernel a chunk.

Shapes: N labels, H numbers a token, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ptuning.families.logits import TARGETS
from ptuning.kernels.product import frozen_product

CHUNKS, LIGER = "chunks", "liger"  # what a loss without logits is computed by

# Logits of so many numbers at a time, 64 MB in fp32; with a quarter of that products were up to 2.6 times slower.
CHUNK = 1 << 24


def rows_at_once(vocabulary: int, chunk: int = CHUNK) -> int:
    """Labels whose logits `LabelLoss` computes at a time."""
    return max(chunk // vocabulary, 1)


def momentary_bytes(by: str, labels: int, hidden: int, vocabulary: int, itemsize: int) -> int:
    """What the loss takes while it is computed, beside the gradient that it keeps; all labels' logits are none of it.

    Args:
        by: `CHUNKS` or `LIGER`.
        labels: N.
        hidden: H.
        vocabulary: V.
        itemsize: bytes of a number of the hidden states.
    """
    if by == LIGER:
        # a chunk's logits, whose gradient takes their place: N H numbers or up to twice that, by its source (0.8.5)
        rows = 1 << (-(-labels // -(-vocabulary // hidden)) - 1).bit_length()
        return min(rows, labels) * vocabulary * itemsize
    # a chunk's logits in fp32, once more inside logsumexp, or before and after it in the model's own numbers
    return min(rows_at_once(vocabulary), labels) * vocabulary * (4 + max(4, itemsize))


class LabelLoss(torch.autograd.Function):
    """Σ log Σ exp(h Wᵀ + b) − (h Wᵀ + b)[target], and dh = (softmax(h Wᵀ + b) − onehot) W with it.

    Kept is dh (N, H) instead of the logits' softmax (N, V), and no more than a chunk's logits are there at any moment. The loss is
    the end of a step, whose own gradient is one number; so computing dh at once costs no product more than computing it later.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, multiply, chunk):
        losses, gradients = [], []
        rows = rows_at_once(len(weight_VH), chunk)
        for hidden, targets in zip(hidden_NH.split(rows), targets_N.split(rows), strict=True):
            logits = multiply(hidden, weight_VH, bias_V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = logits.logsumexp(-1, keepdim=True)
            at = targets[:, None]
            losses.append((total - logits.gather(-1, at)).sum())
            share = logits.sub_(total).exp_().scatter_add_(-1, at, torch.full_like(total, -1.0))
            gradients.append(multiply(share.to(hidden.dtype), weight_VH.t(), None))
            del logits, share  # before the next chunk's are made
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden_NH))
        return torch.stack(losses).sum() if losses else hidden_NH.new_zeros(())

    @staticmethod
    def backward(ctx, dloss):
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * dloss.to(gradient_NH.dtype), None, None, None, None, None


def liger_loss() -> Callable[..., torch.Tensor] | None:
    """liger-kernel's summed cross entropy of (weight (V, H), hidden (N, H), targets (N,), bias (V,) or None); None where it isn't
    installed. Its kernels run on GPUs alone, and on at least one label."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def gpu_loss() -> str | None:
    """The better way to the loss on this machine's GPU: `LIGER` or `CHUNKS`; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return CHUNKS if liger_loss() is None else LIGER


class LossHead:
    """In front of the class of a frozen output layer: while training, and told its labels, gives their summed loss for logits.

    `liger`: what `liger_loss` gives, to be used in place of `LabelLoss`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    training: bool
    liger: Callable[..., torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain: Any = super()
        targets_N = getattr(self, TARGETS, None)
        mixed = torch.is_autocast_enabled(input.device.type)
        if targets_N is None or not self.training or self.weight.requires_grad or mixed:
            return plain.forward(input)
        if self.liger is not None and len(targets_N):
            return self.liger(self.weight, input, targets_N, self.bias)
        multiply = frozen_product(self, input)
        return LabelLoss.apply(input, self.weight, self.bias, targets_N, multiply, CHUNK)
