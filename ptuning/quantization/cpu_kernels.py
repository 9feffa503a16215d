"""`--cpu_kernels fast`: a quantised base on a CPU computes with packed matrices, whose rows need not be unpacked each time."""

import contextlib
import ctypes
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.errors import ConfigError
from ptuning.messages import message
from ptuning.quantization.choice import precision_in
from ptuning.quantization.linear import QuantizedLinear
from ptuning.quantization.packed import Packed, works
from ptuning.quantization.precision import RowWise, precision_of

_HEAD = precision_of(8)  # of the output layer, which official files keep in 16 bit
_ROWS = 4096  # of the output layer quantised at a time: in fp32 it is 1 GB of a 6B model


class PackedLinear(nn.Linear):
    """In place of a linear layer of a base that only answers. A subclass, so that peft takes it for one.

    Args:
        linear: gives widths and bias.
        packed: its matrix and bias.
    """

    def __init__(self, linear: nn.Linear, packed: Packed):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.packed = linear.in_features, linear.out_features, packed
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)  # peft asks where it is
        self.bias = linear.bias  # the packed matrix adds it

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.requires_grad and torch.is_grad_enabled():
            raise ConfigError("--cpu_kernels fast has no gradients: use --cpu_kernels exact")
        output = self.packed(input.reshape(-1, self.in_features), input.dtype)
        return output.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.packed.about}"


def choose_kernels(model: PreTrainedModel, asked: str | None, say: Callable[[str], object]) -> None:
    """Gives a bare base the kernels asked for, and says which where it is a matter of choice.

    Args:
        model: in eval mode; changed in place, layer by layer, so that little more memory is used than before.
        asked: exact or fast; None: fast where that is possible.
        say: gets one line; none where the base isn't in whole numbers, or not on a CPU, and nothing was asked for.
    """
    precision = precision_in(model.config)
    if not isinstance(precision, RowWise) or model.device.type != "cpu":
        if asked == "fast":
            why = "not_on_a_cpu" if isinstance(precision, RowWise) else "not_quantized"
            say(message("no_fast_kernels", why=message(why)))
    elif asked == "exact":
        say(message("exact_kernels"))
    elif any(_kernel(each) is None for each in (precision, _HEAD)):
        say(message("no_fast_kernels", why=message("packed_products_fail")))
    else:
        pack(model)
        say(message("fast_kernels", how=_how(precision)))


def _kernel(precision: RowWise) -> type[Packed] | None:
    """The fastest one that works here."""
    return next((kind for kind in precision.packed if _why_not(kind, precision) is None), None)


def _why_not(kind: type[Packed], precision: RowWise) -> str | None:
    return kind.missing() or (None if works(kind, precision.top) else "wrong_products")


def _how(precision: RowWise) -> str:
    kind, fastest = _kernel(precision), precision.packed[0]
    why = _why_not(fastest, precision)
    if kind is None or why is None:
        return fastest.about
    return message("slower_kernel", how=kind.about, faster=fastest.about, why=message(why))


def pack(model: PreTrainedModel) -> None:
    """Replaces the quantised linear layers and the output layer; each original is released before the next one is packed."""
    head = model.get_output_embeddings()
    names = [name for name, part in model.named_modules() if isinstance(part, QuantizedLinear)]
    # The output layer first: it needs most room besides, and the others may not be read from their files yet.
    for name in [*(name for name, part in model.named_modules() if part is head), *names]:
        head, made = None, _packed(model.get_submodule(name))
        if made is not None:
            model.set_submodule(name, made)
        _give_back()


def _give_back() -> None:
    """What was freed goes to the system: between the packed matrices glibc would keep 0.75 GB of a 6B model's 6.8."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _packed(linear: nn.Linear) -> PackedLinear | None:
    """None: a shape that the kernel doesn't take."""
    precision = linear.precision if isinstance(linear, QuantizedLinear) else _HEAD
    kind = _kernel(precision)
    if kind is None or not kind.takes(linear.out_features, linear.in_features):
        return None
    with torch.no_grad():
        whole_RC, scale_R = _numbers(linear, precision)
        bias_R = None if linear.bias is None else linear.bias.float()
        return PackedLinear(linear, kind(whole_RC, scale_R, bias_R))


def _numbers(linear: nn.Linear, precision: RowWise) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (R, C) int8, and scales (R,)."""
    if isinstance(linear, QuantizedLinear):
        return precision.unpack(linear.weight.data), linear.weight_scale.data
    # An output layer may multiply by something else than what is stored, such as rows of length 1.
    weight = getattr(linear, "effective_weight", linear.weight)
    parts = [precision.quantize(rows.float()) for rows in weight.data.split(_ROWS)]
    stored, scales = zip(*parts, strict=True)
    return precision.unpack(torch.cat(stored)), torch.cat(scales)
