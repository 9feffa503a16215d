"""x Wᵀ + b with a frozen W, by whichever of torch's two libraries is faster on this machine.

torch multiplies fp32 matrices on a CPU with MKL (or OpenBLAS); oneDNN, which is in the same torch, has been measured between 1.0
and 2.3 times as fast, depending on the processor. Its entry is a private operator, so that it is looked for and tried first.
Results differ by rounding (4e-7 relative), hence a run keeps the product that it began with.

Shapes: M rows, C inputs, R outputs.
"""

import time

import torch
from torch import nn

TORCH, ONEDNN = "torch", "onednn"

# Two starts on one machine must choose the same, a busy one too: therefore the fastest of several short runs each, and a margin.
CLEARLY_FASTER = 1.3
_ROWS, _INPUTS, _OUTPUTS, _REPETITIONS = 256, 512, 512, 15  # 0.13 GFLOP: 70 ms for both libraries in both directions


def products() -> tuple[str, ...]:
    """The products that this torch has."""
    return (TORCH, ONEDNN) if _has_onednn() else (TORCH,)


def fastest_product() -> str:
    """oneDNN where it is clearly faster in the fastest of a few alternating runs of about 70 ms in all, else torch's own."""
    if not _has_onednn():
        return TORCH
    x_MC, dy_MR, weight_RC = torch.randn(_ROWS, _INPUTS), torch.randn(_ROWS, _OUTPUTS), torch.randn(_OUTPUTS, _INPUTS)
    ways = {
        TORCH: lambda: (nn.functional.linear(x_MC, weight_RC), dy_MR @ weight_RC),
        ONEDNN: lambda: (_onednn(x_MC, weight_RC, None), _onednn(dy_MR, weight_RC.t(), None)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(1 + _REPETITIONS):  # the first one sets the libraries up
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    plain, other = (min(seconds[name][1:]) for name in (TORCH, ONEDNN))
    return ONEDNN if plain > CLEARLY_FASTER * other else TORCH


class FrozenProduct(torch.autograd.Function):
    """oneDNN's x Wᵀ + b; the gradient of x is dy W, and of x itself nothing is kept."""

    @staticmethod
    def forward(ctx, x, weight_RC, bias_R):
        ctx.save_for_backward(weight_RC)
        return _onednn(x, weight_RC, bias_R)

    @staticmethod
    def backward(ctx, dy):
        (weight_RC,) = ctx.saved_tensors
        return _onednn(dy, weight_RC.t(), None), None, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weights don't train; in place of one by its class alone, so that peft takes it for one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.weight.requires_grad or not _takes(input, self.weight):
            return super().forward(input)
        return FrozenProduct.apply(input, self.weight, self.bias)


def _takes(*tensors: torch.Tensor) -> bool:
    plain = all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)
    return plain and not torch.is_autocast_enabled("cpu")


def _onednn(x: torch.Tensor, weight_RC: torch.Tensor, bias_R: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight_RC, bias_R, "none", [], "")


def _has_onednn() -> bool:
    """Whether the operator is there and computes what it is used for."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.ones(2, 4), torch.eye(3, 4), torch.ones(3)
    try:
        forward, backward = _onednn(x, weight, bias), _onednn(torch.ones(2, 3), weight.t(), None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool((forward == 2).all()) and torch.equal(backward, torch.ones(2, 3) @ weight)
