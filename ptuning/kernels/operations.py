"""What lies between the products of a packed base, compiled: each for itself, and as records of a program (step.py).

Shapes: N rows, H numbers a token, F feed-forward width, P heads of each of G groups, D head dimension.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ptuning.kernels.attend_code import room_bytes
from ptuning.kernels.step_code import SLOTS, source
from ptuning.quantization.llvm import compiled, of_openmp

_AT_ONCE = 1 << 15  # numbers that take less time than a second thread takes to wake up
_FUNCTIONS = ("run", "nothing", "norm", "rotate", "attend", "gate")


class Operations:
    """Args:
    lanes: 32-bit numbers in a register.
    """

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.addresses = compiled(source(lanes), *_FUNCTIONS)
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.addresses["run"])

    def program(self, records: Sequence[Sequence[int]], threads: int) -> torch.Tensor:
        """What `run` takes."""
        barrier = self.addresses["nothing"] if threads == 1 else of_openmp("GOMP_barrier")
        head = [threads, of_openmp("GOMP_parallel"), barrier, len(records)]
        return torch.tensor([*head, *(number for each in records for number in each)])

    def record(self, function: str | int, *told: int, wait: bool = True) -> tuple[int, ...]:
        """A function at work.

        Args:
            function: one of these, or the address of another one.
            told: to it.
            wait: whether all threads wait for each other behind it.
        """
        address = self.addresses[function] if isinstance(function, str) else function
        return address, wait, *told, *[0] * (SLOTS - len(told))

    def run(self, program: torch.Tensor) -> None:
        """Computes all records; another thread may compute another program at the same time."""
        self._run(program.data_ptr())

    def norm(self, x: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm of (…, H) bf16."""
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        told = (x.data_ptr(), 0, weight_H.data_ptr(), out.data_ptr(), x.numel() // width, width, bits(epsilon))
        self._alone("norm", x.numel(), *told)
        return out

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up of [gate, up] (…, 2F) bf16."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        self._alone("gate", x.numel(), x.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths_N: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of single tokens, in bf16.

        Args:
            query: (N, G P, 1, D).
            key: (N, G, columns, D), each column's D numbers behind the one's before it; `value` lies as it does.
            lengths_N: int64, columns in use.

        Returns:
            (N, 1, G P, D).
        """
        rows, heads, _, head_dim = query.shape
        query, lengths_N = query.contiguous(), lengths_N.contiguous()
        columns, threads = int(lengths_N.max()), torch.get_num_threads()
        room = torch.empty(threads, room_bytes(columns, head_dim, self.lanes), dtype=torch.uint8)
        out = query.new_empty(rows, 1, heads, head_dim)
        told = attend_arguments(query, key, value, lengths_N, out, room, scaling)
        self._alone("attend", rows * heads * columns, *told)
        return out

    def _alone(self, function: str, numbers: int, *told: int) -> None:
        threads = 1 if numbers < _AT_ONCE else torch.get_num_threads()
        self.run(self.program([self.record(function, *told, wait=False)], threads))


def attend_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths_N: torch.Tensor,
    out: torch.Tensor,
    room: torch.Tensor,
    scaling: float,
) -> tuple[int, ...]:
    """What `attend` is told. query (N, G P, …, D) in one piece; key and value (N, G, columns, D) lie alike; room (threads, …)."""
    rows, heads, head_dim, groups = query.shape[0], query.shape[1], query.shape[-1], key.shape[1]
    size = query.element_size()
    return (
        *(each.data_ptr() for each in (query, key, value, lengths_N, out, room)),
        *(size * heads * head_dim, size * head_dim, size * key.stride(0), size * key.stride(1)),
        *(rows, groups, heads // groups, head_dim, bits(scaling), room.shape[1]),
    )


def bits(value: float) -> int:
    """Of an fp32 number."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


class CompiledNorm:
    """In front of a family's norm class (`Family.norm`) of a base that only answers."""

    weight: nn.Parameter
    variance_epsilon: float
    operations: Operations

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.bfloat16:
            plain: Any = super()
            return plain.forward(hidden_states)
        return self.operations.norm(hidden_states, self.weight, self.variance_epsilon)


class CompiledFeedForward:
    """In front of a family's feed-forward class (`Family.feed_forward`) of a base that only answers."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    operations: Operations

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.bfloat16:
            plain: Any = super()
            return plain.forward(hidden_states)
        return self.down_proj(self.operations.gate(self.gate_up_proj(hidden_states)))
