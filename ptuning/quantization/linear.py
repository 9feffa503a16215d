"""A linear layer on quantised weights, packed in memory; gradients go through it to its input, its weights never change."""

from __future__ import annotations

import torch
from torch import nn

from ptuning.quantization.precision import RowWise

SCALE = "_scale"  # behind a weight's name, in the model and in files


class QuantizedLinear(nn.Linear):
    """In place of a linear layer. A subclass, so that peft takes it for one.

    Args:
        linear: gives widths and dtype; its weights aren't read.
        precision: how `weight` is stored.
    """

    def __init__(self, linear: nn.Linear, precision: RowWise):
        nn.Module.__init__(self)  # nn.Linear's own would make the whole matrix
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        rows, dtype = linear.out_features, linear.weight.dtype
        device, columns = linear.weight.device, precision.stored_columns(linear.in_features)
        self.weight = _frozen(torch.empty(rows, columns, dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(rows, dtype=dtype, device=device))
        self.bias = None if linear.bias is None else _frozen(torch.empty(rows, dtype=dtype, device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output = _Product.apply(input.to(dtype), self.weight, self.weight_scale, self.precision)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _apply(self, fn, recurse=True):
        # A cast of the whole model leaves the scale in the files' dtype: in bf16 it would be another matrix.
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.precision.name}"


class _Product(torch.autograd.Function):
    """x (…, C) → x Wᵀ (…, R). The matrix in full lives only while it is multiplied, in both directions."""

    @staticmethod
    def forward(ctx, x, stored, scale, precision):
        ctx.save_for_backward(stored, scale)
        ctx.precision = precision
        return x @ precision.dequantize(stored, scale, x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):
        stored, scale = ctx.saved_tensors
        return gradient @ ctx.precision.dequantize(stored, scale, gradient.dtype), None, None, None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
