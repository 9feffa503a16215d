"""int8 × int4 and int8 × int8 by programs that llvmlite compiles when they are first asked for (a fifth of a second)."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
from abc import abstractmethod
from functools import cache

import torch

from ptuning.quantization.int_product_code import ARGUMENTS, MULTIPLE, source
from ptuning.quantization.int_tile import GROUP, SETS, STEP, Instructions
from ptuning.quantization.llvm import compiled, of_openmp
from ptuning.quantization.packed import Packed

_BLOCKS = 16  # of outputs, packed at a time
_HUGE = 2 << 20  # bytes of a large page
_PARALLEL = "GOMP_parallel"
_ALONE = 2 << 20  # products that take less time than a second thread takes to wake up
_Arguments = ctypes.c_int64 * len(ARGUMENTS)


class Compiled(Packed):
    """Each row of the input is rounded to 8 bit, in groups of 128 columns, each by its own largest value.

    Computed on torch's own threads, as many as torch would take. Any number of threads may call it at the same time.

    Args:
        instructions: default: the best that this processor has.
    """

    bits: int
    lacking: str  # what a processor without the instructions lacks, as a name in `messages.py`

    def __init__(
        self,
        whole_RC: torch.Tensor,
        scale_R: torch.Tensor,
        bias_R: torch.Tensor | None = None,
        instructions: Instructions | None = None,
    ):
        its = instructions or _best(self.bits)
        if its is None:
            raise RuntimeError("this processor has none of the instructions")
        self.functions, self.lanes = _functions(its, self.bits), its.lanes
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.functions["run"])
        self._rows, self._columns = whole_RC.shape
        width = its.width
        blocks = -(-self._rows // width)
        self._weight = _room(blocks * width * self._columns * self.bits // 8)
        packed = self._weight.view(torch.int32).view(blocks, self._columns // STEP, -1, width)
        for first in range(0, blocks, _BLOCKS):
            rows = whole_RC[first * width : (first + _BLOCKS) * width]
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % width))
            packed[first : first + _BLOCKS] = self._words(rows).unflatten(0, (-1, width)).movedim(1, 3)
        self._scale_R, self._bias_R = torch.zeros(2, blocks * width)
        self._scale_R[: self._rows] = scale_R
        if bias_R is not None:
            self._bias_R[: self._rows] = bias_R

    @staticmethod
    @abstractmethod
    def _words(whole_RC: torch.Tensor) -> torch.Tensor:
        """int8 → (R, C / 8, words) int32: of 8 columns each."""

    def __call__(self, x_NC: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if x_NC.dtype not in (torch.float32, torch.bfloat16):
            x_NC = x_NC.float()
        if x_NC.stride(1) != 1:
            x_NC = x_NC.contiguous()
        rows = len(x_NC)
        product = torch.empty(rows, self._rows, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        if not rows:
            return product.to(dtype)
        room = torch.empty(room_bytes(rows, self._columns), dtype=torch.uint8)
        threads = 1 if rows * self._rows * self._columns < _ALONE else torch.get_num_threads()
        self._run(_Arguments(*self.arguments(x_NC, product, room, rows, x_NC.stride(0), threads)))
        return product.to(dtype)

    def arguments(
        self, x: torch.Tensor, out: torch.Tensor, room: torch.Tensor, rows: int, distance: int, threads: int
    ) -> tuple[int, ...]:
        """What the functions are told, but for the counters, which begin at 0.

        Args:
            x: (rows, C) fp32 or bf16 lie there, `distance` numbers from one to the next.
            out: (rows, R) fp32 or bf16 will lie there.
            room: `room_bytes` for the rounded rows.
            rows: N.
            threads: of `run`.
        """
        q = room.data_ptr()
        sums = q + rows * self._columns
        steps = sums + 4 * rows * -(-self._columns // GROUP)
        return (
            x.data_ptr(),
            self._weight.data_ptr(),
            self._scale_R.data_ptr(),
            out.data_ptr(),
            q,
            sums,
            steps,
            self._bias_R.data_ptr(),
            of_openmp(_PARALLEL),
            distance,
            rows,
            self._columns,
            self._rows,
            threads,
            x.dtype == torch.bfloat16,
            out.dtype == torch.bfloat16,
        )

    @staticmethod
    def takes(rows: int, columns: int) -> bool:
        return columns % MULTIPLE == 0

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("llvmlite") is None:
            return "no_llvmlite"
        if _best(cls.bits) is None:
            return cls.lacking
        return "no_openmp" if of_openmp(_PARALLEL) == 0 else None


class CompiledInt4(Compiled):
    """Half a byte a number."""

    about, bits, lacking = "int8 × int4", 4, "no_byte_products"

    @staticmethod
    def _words(whole_RC: torch.Tensor) -> torch.Tensor:
        low, high = (whole_RC + 8).view(torch.int32).unflatten(1, (-1, 2)).unbind(-1)  # four numbers each
        return (low | high << 4)[..., None]


class CompiledInt8(Compiled):
    """A byte a number."""

    about, bits, lacking = "int8 × int8", 8, "no_vnni"

    @staticmethod
    def _words(whole_RC: torch.Tensor) -> torch.Tensor:
        return (whole_RC ^ -0x80).view(torch.int32).unflatten(1, (-1, 2))  # the sign bit turned over is 128 added


def room_bytes(rows: int, columns: int) -> int:
    """For rows of 8-bit numbers, and a sum and a scale of each of their groups."""
    return rows * (columns + 8 * -(-columns // GROUP))


def runs_on(instructions: Instructions) -> bool:
    """Whether this processor has them."""
    import llvmlite.binding as llvm

    return all(llvm.get_host_cpu_features().get(name) for name in instructions.needs)


@cache
def _best(bits: int) -> Instructions | None:
    return next((each for each in SETS if (each.dots or bits == 4) and runs_on(each)), None)


@cache
def _functions(instructions: Instructions, bits: int) -> dict[str, int]:
    return compiled(source(instructions, bits), "run", "quantise", "product")


def _room(size: int) -> torch.Tensor:
    """Bytes, in the system's large pages where there are some."""
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
