"""x Wᵀ + b with a frozen W, by whichever of torch's two libraries is faster on this machine.

torch multiplies fp32 matrices on a CPU with MKL (or OpenBLAS); oneDNN, which is in the same torch, has been measured between 1.0
and 2.3 times as fast, depending on the processor. Its entry is a private operator, so that it is looked for and tried first.
Results differ by rounding (4e-7 relative), hence a run keeps the product that it began with.

Shapes: M rows, C inputs, R outputs.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TORCH, ONEDNN = "torch", "onednn"

# Two starts on one machine must choose the same, a busy one too: hence a margin, and steady times.
CLEARLY_FASTER = 1.3
STEADY = 1.2  # the median over the best; more is a machine that does other work
_ROWS, _INPUTS, _OUTPUTS, _REPETITIONS, _MEASUREMENTS = 256, 512, 512, 9, 6  # 0.13 GFLOP a product: 40 ms a measurement
_ANSWERED, _AT_ONCE = 16, 8  # rows that are answered side by side, and products timed together: 0.07 GFLOP
# Rows of a product from which on oneDNN may be the faster one; of a single answer's tokens MKL's is (docs/benchmarks.md).
LEAST_ROWS = 4


def products() -> tuple[str, ...]:
    """The products that this torch has."""
    return (TORCH, ONEDNN) if _has_onednn() else (TORCH,)


def fastest_product() -> str:
    """oneDNN where the first two steady ones of a few short measurements both find it clearly faster, else torch's own.

    Beside other work times vary several-fold and their ratio says nothing: where it is 1.1, medians were 0.7 to 3.1 at load 8, and
    the fastest of 15 runs said more than 1.3 in 4 of 40 starts beside three busy processes. About 80 ms; more where nothing is
    steady.
    """
    return _faster(_a_training_step())


def fastest_to_answer() -> str:
    """The same for products of a few rows and without gradients, as answers to several requests have them."""
    return _faster(_a_decoding_step())


def _faster(ways: dict[str, Callable[[], object]]) -> str:
    if not _has_onednn():
        return TORCH
    said = (_is_clearly_faster(_measured(ways)) for _ in range(_MEASUREMENTS))
    first_two = list(itertools.islice((each for each in said if each is not None), 2))
    return ONEDNN if first_two == [True, True] else TORCH


def _a_training_step() -> dict[str, Callable[[], object]]:
    """A product and its gradient, by library."""
    x_MC, dy_MR, weight_RC = torch.ones(_ROWS, _INPUTS), torch.ones(_ROWS, _OUTPUTS), torch.ones(_OUTPUTS, _INPUTS)
    return {
        TORCH: lambda: (nn.functional.linear(x_MC, weight_RC), dy_MR @ weight_RC),
        ONEDNN: lambda: (_onednn(x_MC, weight_RC, None), _onednn(dy_MR, weight_RC.t(), None)),
    }


def _a_decoding_step() -> dict[str, Callable[[], object]]:
    """Some products of few rows, by library."""
    x_MC, weight_RC = torch.ones(_ANSWERED, _INPUTS), torch.ones(_OUTPUTS, _INPUTS)
    return {
        TORCH: lambda: [nn.functional.linear(x_MC, weight_RC) for _ in range(_AT_ONCE)],
        ONEDNN: lambda: [_onednn(x_MC, weight_RC, None) for _ in range(_AT_ONCE)],
    }


def _measured(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(1 + _REPETITIONS):  # the first one sets the libraries up
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def _is_clearly_faster(seconds: dict[str, list[float]]) -> bool | None:
    """Whether oneDNN is, by the median and by the best; None where the times aren't steady."""
    if any(statistics.median(times) > STEADY * min(times) for times in seconds.values()):
        return None
    return all(figure(seconds[TORCH]) > CLEARLY_FASTER * figure(seconds[ONEDNN]) for figure in (statistics.median, min))


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
    """A linear layer whose weights don't train; in place of one by its class alone, so that peft takes it for one.

    `trains` and `answers`: whether oneDNN multiplies in training mode, and in evaluation mode without gradients.
    """

    trains, answers = True, False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not takes_onednn(input, self.weight):
            return super().forward(input)
        if self.training:
            if self.trains and not self.weight.requires_grad:
                return FrozenProduct.apply(input, self.weight, self.bias)
        elif self.answers and not torch.is_grad_enabled() and input.numel() >= LEAST_ROWS * self.in_features:
            return _onednn(input, self.weight, self.bias)
        return super().forward(input)


def frozen_product(linear: Any, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """(x, W, b) → x Wᵀ + b as a layer computes it in training."""
    chosen = isinstance(linear, FrozenLinear) and linear.trains and takes_onednn(x, linear.weight)
    return _onednn if chosen else nn.functional.linear


def takes_onednn(*tensors: torch.Tensor) -> bool:
    """Whether products of these are for oneDNN: in fp32 on a CPU, as they are."""
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
