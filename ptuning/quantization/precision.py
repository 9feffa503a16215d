"""How a base's matrices are stored, and the official way: whole numbers and one scale for each row, to the last bit.

Source of the arithmetic: THUDM/chatglm2-6b `quantization.py`. Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptuning.errors import ConfigError
from ptuning.quantization.int_product import CompiledInt4, CompiledInt8
from ptuning.quantization.packed import Packed, PackedInt4, PackedInt8

METHOD = "chatglm"  # quant_method inside transformers; where it stands in files is the family's matter


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=…)` takes; its dtype must be the files' own, in which scales are computed and
    kept. `convert_rest` then gives the other tensors the dtype to compute in.

    Args:
        bits: of --quantization_bit.
    """

    def __init__(self, bits: int, **_: object):
        self.quant_method, self.bits = METHOD, bits


class Precision(ABC):
    """One way to store the matrices of a base."""

    name: str  # in manifests and messages
    option: str  # what asks for it on a command line
    bits: int | None = None  # in the config.json of files that are stored so; None: there are none
    readable = False  # by peft, which must see the matrices in full for a DoRA

    @abstractmethod
    def config(self, dtype: torch.dtype) -> QuantizationConfigMixin:
        """For `from_pretrained`, of files that aren't quantised.

        Args:
            dtype: that the model is to compute in.
        """

    @abstractmethod
    def bytes_of(self, rows: int, columns: int, scale_bytes: int) -> int:
        """Memory of a matrix."""


class RowWise(Precision):
    """Row-wise symmetric: scale = largest absolute value of the row / `top`, whole number = round(weight / scale)."""

    bits: int  # also of --quantization_bit
    top: int  # the largest whole number
    packed: tuple[type[Packed], ...]  # the CPU kernels for it, the fastest one first

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    @property
    def option(self) -> str:  # type: ignore[override]
        return f"--quantization_bit {self.bits}"

    def config(self, dtype: torch.dtype) -> QuantizationConfig:
        return QuantizationConfig(self.bits)

    @abstractmethod
    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        """int8 numbers from -top to top → as they are stored, (R, `stored_columns`) int8."""

    @abstractmethod
    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """The opposite of `pack`."""

    @abstractmethod
    def shifted(self, stored: torch.Tensor) -> torch.Tensor:
        """As they are stored → as other programs pack them into integers: counted from 0 (2^(bits - 1) added), in whole bytes, the
        first column in the lowest bits."""

    @abstractmethod
    def stored_columns(self, columns: int) -> int:
        """Bytes that a row takes.

        Raises:
            ConfigError: rows of this length can't be stored.
        """

    def quantize(
        self, weight_RC: torch.Tensor, scale_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix → stored numbers and scales (R,), by default in the matrix's own dtype; another one is rounded to before the
        division.

        The arithmetic is done in the matrix's own dtype: that of fp16 weights in fp32 would change one int8 number in a
        hundred. In a row of tiny fp16 weights, where the official code's numbers overflow, `top` is the largest.
        """
        scale_R = (weight_RC.abs().amax(-1) / self.top).to(scale_dtype or weight_RC.dtype)
        whole_RC = torch.round(weight_RC / scale_R[:, None])
        # A row of zeros has scale 0. NaN is still seen in the scale.
        whole_RC = whole_RC.nan_to_num_(0, self.top, -self.top).clamp_(-self.top, self.top)
        return self.pack(whole_RC.to(torch.int8)), scale_R

    def dequantize(self, stored: torch.Tensor, scale_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(R, C) in `dtype`, rounded once."""
        exact = torch.promote_types(scale_R.dtype, dtype)  # an fp16 scale in bf16 would change logits by 0.07
        return self.unpack(stored).to(exact).mul_(scale_R.to(exact)[:, None]).to(dtype)

    def bytes_of(self, rows: int, columns: int, scale_bytes: int) -> int:
        return rows * (self.stored_columns(columns) + scale_bytes)


class Int8(RowWise):
    """One number a byte."""

    bits, top, packed = 8, 127, (CompiledInt8, PackedInt8)

    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        return whole_RC

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return stored

    def shifted(self, stored: torch.Tensor) -> torch.Tensor:
        return stored ^ -0x80  # the sign bit turned over is 128 added

    def stored_columns(self, columns: int) -> int:
        return columns


class Int4(RowWise):
    """Two numbers a byte: an even column in the high half, the odd one after it in the low half, both signed."""

    bits, top, packed = 4, 7, (CompiledInt4, PackedInt4)

    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        return (whole_RC[:, 0::2] << 4) | (whole_RC[:, 1::2] & 0xF)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return torch.stack((stored >> 4, (stored << 4) >> 4), -1).flatten(-2)  # shifts of int8 keep the sign

    def shifted(self, stored: torch.Tensor) -> torch.Tensor:
        return ((stored >> 4) & 0xF | stored << 4) ^ -0x78  # 0x88, both sign bits, as int8

    def stored_columns(self, columns: int) -> int:
        if columns % 2:
            raise ConfigError(
                f"a matrix of {columns} columns can't be packed two numbers a byte; use --quantization_bit 8"
            )
        return columns // 2


_ROW_WISE: dict[int, RowWise] = {precision.bits: precision for precision in (Int8(), Int4())}


def precisions() -> list[RowWise]:
    """The official ones."""
    return list(_ROW_WISE.values())


def precision_of(bits: int) -> RowWise:
    """The precision of a --quantization_bit or a config.json.

    Raises:
        ConfigError: there is none of so many bits.
    """
    if bits not in _ROW_WISE:
        known = " or ".join(str(number) for number in _ROW_WISE)
        raise ConfigError(f"quantization_bit is {bits}; use {known}, or leave it out for the 16-bit base")
    return _ROW_WISE[bits]
