"""Products with whole numbers on a CPU: what they have in common, and those through torch's own packed kernels. Forward only.

torch's operations are not part of its public interface, and torch announces that its quantised tensors will go: `works` is
asked before a kernel is used. Each row of the input is computed by itself, so that a row alone equals the row in a batch.

Shapes: N rows of the input, R outputs, C inputs of the matrix.
"""

import warnings
from abc import ABC, abstractmethod
from functools import cache

import torch

_QUANTIZED, _ATEN = torch.ops.quantized, torch.ops.aten
_TOLERANCE = 0.03  # relative, of a row; one wrapped or saturated sum is far more


class Packed(ABC):
    """A matrix in the order in which a kernel reads it.

    Args:
        whole_RC: int8.
        scale_R: of each row.
        bias_R: added to the product; None: nothing is.
    """

    about: str  # what the product leaves out, in words that need no translation

    @abstractmethod
    def __init__(self, whole_RC: torch.Tensor, scale_R: torch.Tensor, bias_R: torch.Tensor | None = None): ...

    @abstractmethod
    def __call__(self, x_NC: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(N, R), computed in fp32 and rounded to `dtype`."""

    @staticmethod
    def takes(rows: int, columns: int) -> bool:
        """Whether the kernel can compute a matrix of this shape."""
        return True

    @classmethod
    def missing(cls) -> str | None:
        """What this machine lacks for it, as a name in `messages.py`; None: nothing known, so that it may be tried."""
        return None


class PackedInt8(Packed):
    """int8 × int8: each row of the input is rounded to 8 bit too, by its own largest value."""

    about = "int8 × int8 (torch)"

    def __init__(self, whole_RC: torch.Tensor, scale_R: torch.Tensor, bias_R: torch.Tensor | None = None):
        self._bias_R = bias_R
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the announcement
            zeros = torch.zeros(len(scale_R), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(whole_RC, scale_R.double(), zeros, 0)
            self._weight = _QUANTIZED.linear_prepack(weight, None)

    def __call__(self, x_NC: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x_NC = x_NC.float()
        # linear_dynamic would take one scale for the whole batch: beside a large row the others would be 40 % off.
        largest_N = x_NC.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        product = _QUANTIZED.linear_with_input_q_dq_qweight_dq_output_fp32(x_NC / largest_N, 1 / 127, 128, self._weight)
        return _finished(product.mul_(largest_N), self._bias_R, dtype)


class PackedInt4(Packed):
    """bf16 × int4, half a byte a number; whole numbers go in with scale 1, so that no scale is rounded."""

    about = "bf16 × int4"

    def __init__(self, whole_RC: torch.Tensor, scale_R: torch.Tensor, bias_R: torch.Tensor | None = None):
        self._bias_R = bias_R
        rows, columns = whole_RC.shape
        self._group = next(group for group in (256, 128, 64, 32) if columns % group == 0)
        self._weight = _ATEN._convert_weight_to_int4pack_for_cpu(whole_RC.int().add_(8), 1)
        self._one = torch.zeros(columns // self._group, rows, 2, dtype=torch.bfloat16)  # scale and zero point
        self._one[..., 0] = 1
        self._scale_R = scale_R.float()

    def __call__(self, x_NC: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # In fp32 the same operation takes 60 times as long.
        product = _ATEN._weight_int4pack_mm_for_cpu(x_NC.bfloat16(), self._weight, self._group, self._one)
        return _finished(product.float().mul_(self._scale_R), self._bias_R, dtype)

    @staticmethod
    def takes(rows: int, columns: int) -> bool:
        return rows % 16 == 0 and columns % 32 == 0


def _finished(product: torch.Tensor, bias_R: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (product if bias_R is None else product.add_(bias_R)).to(dtype)


@cache
def works(kind: type[Packed], top: int) -> bool:
    """Whether a kernel is there and right on this machine, by a small product whose sums are as large as they get.

    Args:
        top: the largest whole number of its matrices.
    """
    draw = torch.Generator().manual_seed(0)
    whole_RC = torch.randint(-top, top + 1, (64, 256), generator=draw, dtype=torch.int8)
    whole_RC[0], whole_RC[1] = top, -top
    scale_R = torch.rand(64, generator=draw) + 0.5
    x_NC = torch.randn(3, 256, generator=draw)
    x_NC[0] = 1  # where 16-bit sums would saturate, as on CPUs without VNNI
    exact = x_NC @ (whole_RC * scale_R[:, None]).t()
    try:
        packed = kind(whole_RC, scale_R)
        product = packed(x_NC)
        alone = torch.cat([packed(row[None]) for row in x_NC])
    except (AttributeError, ImportError, OSError, RuntimeError, NotImplementedError):
        return False
    wrong = (product - exact).norm(dim=1) / exact.norm(dim=1)
    return bool((wrong < _TOLERANCE).all()) and torch.equal(product, alone)
