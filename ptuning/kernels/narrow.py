"""x Wᵀ + b with a frozen W in bf16, sums in fp32, everything around it in fp32: less exact, and faster where the processor
multiplies bf16 itself.

Input and result are rounded to bf16 (8 bits, 2 to 3 digits), and so is the gradient that comes and goes. The weights are packed
once for oneDNN, as they are and transposed, beside the fp32 ones that evaluation computes with: 4 bytes more a weight.

Shapes: C inputs, R outputs.
"""

from typing import Any

import torch

from ptuning.kernels.product import FrozenLinear, takes_onednn

BF16 = "bf16"
_ROWS = 512  # of the products that the weights are packed for; other numbers of rows are computed as well


class NarrowProduct(torch.autograd.Function):
    """y = x Wᵀ + b and dx = dy W, each product of bf16 numbers; of x nothing is kept."""

    @staticmethod
    def forward(ctx, x, packed, transposed, bias_R):
        ctx.transposed = transposed
        out = _multiply(x, packed)
        return out if bias_R is None else out.add_(bias_R)

    @staticmethod
    def backward(ctx, dy):
        return _multiply(dy, ctx.transposed), None, None, None


class NarrowLinear(FrozenLinear):
    """A frozen linear layer that multiplies in bf16 while it trains, else as `FrozenLinear`."""

    trains = False
    packed: torch.Tensor
    transposed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.weight.requires_grad or not takes_onednn(input, self.weight):
            return super().forward(input)
        return NarrowProduct.apply(input, self.packed, self.transposed, self.bias)


def multiply_narrow(linear: Any) -> None:
    """Makes a frozen linear layer in fp32 a `NarrowLinear`."""
    with torch.no_grad():
        weight_RC = linear.weight.bfloat16()
        linear.packed, linear.transposed = _packed(weight_RC), _packed(weight_RC.t().contiguous())
    linear.__class__ = NarrowLinear


def narrow_refusal() -> str | None:
    """Why this machine can't multiply so, or gains nothing by it; None: it does."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")):
        return "torch knows of no bf16 products of this processor (AVX512-BF16 or AMX), so it would be slower"
    try:
        found = _multiply(torch.ones(2, 4), _packed(torch.full((3, 4), 0.5, dtype=torch.bfloat16)))
        right = torch.equal(found, torch.full((2, 3), 2.0))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        right = False
    return None if right else "this torch has no oneDNN products of bf16"


def _multiply(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16().contiguous(), packed, None, "none", [], "").float()


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def packed_bytes(numbers: int) -> int:
    """Memory of a matrix of so many numbers, packed both ways, in bytes."""
    return 2 * 2 * numbers
