"""What a quantised matrix is: whole numbers and one scale for each row, to the last bit the official code's.

Source of the arithmetic: THUDM/chatglm2-6b `quantization.py`. Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ptuning.errors import ConfigError
from ptuning.quantization.packed import Packed, PackedInt4, PackedInt8


class Precision(ABC):
    """Row-wise symmetric: scale = largest absolute value of the row / `top`, whole number = round(weight / scale)."""

    bits: int  # of --quantization_bit and of config.json
    top: int  # the largest whole number
    packed: type[Packed]  # the CPU kernel for it

    @property
    def name(self) -> str:
        """In manifests and messages."""
        return f"int{self.bits}"

    @abstractmethod
    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        """int8 numbers from -top to top → as they are stored, (R, `stored_columns`) int8."""

    @abstractmethod
    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """The opposite of `pack`."""

    @abstractmethod
    def stored_columns(self, columns: int) -> int:
        """Bytes that a row takes.

        Raises:
            ConfigError: rows of this length can't be stored.
        """

    def quantize(self, weight_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix → stored numbers and scales (R,).

        The arithmetic is done in the matrix's own dtype: that of fp16 weights in fp32 would change one int8 number in a
        hundred. In a row of tiny fp16 weights, where the official code's numbers overflow, `top` is the largest.
        """
        scale_R = weight_RC.abs().amax(-1) / self.top
        whole_RC = torch.round(weight_RC / scale_R[:, None])
        # A row of zeros has scale 0. NaN is still seen in the scale.
        whole_RC = whole_RC.nan_to_num_(0, self.top, -self.top).clamp_(-self.top, self.top)
        return self.pack(whole_RC.to(torch.int8)), scale_R

    def dequantize(self, stored: torch.Tensor, scale_R: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(R, C) in `dtype`, rounded once."""
        exact = torch.promote_types(scale_R.dtype, dtype)  # an fp16 scale in bf16 would change logits by 0.07
        return self.unpack(stored).to(exact).mul_(scale_R.to(exact)[:, None]).to(dtype)

    def bytes_of(self, rows: int, columns: int, scale_bytes: int) -> int:
        """Memory of a matrix."""
        return rows * (self.stored_columns(columns) + scale_bytes)


class Int8(Precision):
    """One number a byte."""

    bits, top, packed = 8, 127, PackedInt8

    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        return whole_RC

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return stored

    def stored_columns(self, columns: int) -> int:
        return columns


class Int4(Precision):
    """Two numbers a byte: an even column in the high half, the odd one after it in the low half, both signed."""

    bits, top, packed = 4, 7, PackedInt4

    def pack(self, whole_RC: torch.Tensor) -> torch.Tensor:
        return (whole_RC[:, 0::2] << 4) | (whole_RC[:, 1::2] & 0xF)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return torch.stack((stored >> 4, (stored << 4) >> 4), -1).flatten(-2)  # shifts of int8 keep the sign

    def stored_columns(self, columns: int) -> int:
        if columns % 2:
            raise ConfigError(
                f"a matrix of {columns} columns can't be packed two numbers a byte; use --quantization_bit 8"
            )
        return columns // 2


_PRECISIONS: dict[int, Precision] = {precision.bits: precision for precision in (Int8(), Int4())}


def precisions() -> list[Precision]:
    """All that are known."""
    return list(_PRECISIONS.values())


def precision_of(bits: int) -> Precision:
    """The precision of a --quantization_bit or a config.json.

    Raises:
        ConfigError: there is none of so many bits.
    """
    if bits not in _PRECISIONS:
        known = " or ".join(str(number) for number in _PRECISIONS)
        raise ConfigError(f"quantization_bit is {bits}; use {known}, or leave it out for the 16-bit base")
    return _PRECISIONS[bits]
