"""A decode step of a packed base as one program: the next token of every row through all layers, without a word of Python between
them. Beside what memory allows, hundreds of small operations that find the caches empty are a fifth of a step of one row.

The modules compute with the same functions where a step isn't a program (a row with a LoRA, a prompt's piece beside the rows), so
that a row's numbers don't depend on what else is in the batch.

Shapes: L layers, N rows, H numbers a token, G key/value groups, C columns, D head dimension.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.families import family_of
from ptuning.kernels.attend_code import room_bytes
from ptuning.kernels.operations import Operations, attend_arguments, bits
from ptuning.kernels.step_code import MULTIPLE
from ptuning.kernels.swap import answer_by_operations
from ptuning.quantization.cpu_kernels import PackedLinear
from ptuning.quantization.int_product import Compiled
from ptuning.quantization.int_product import room_bytes as product_bytes

Record = tuple[int, ...]
_programs: WeakKeyDictionary[PreTrainedModel, StepProgram] = WeakKeyDictionary()


def step_program(model: PreTrainedModel) -> StepProgram | None:
    """The program of a bare base that only answers; None where it can't have one. Its norms and feed-forward parts compute with
    the program's functions from then on."""
    layers, kept = _layers(model), _programs.get(model)
    if not layers or (kept is not None and kept.layers == layers):
        return kept if layers else None
    program = _programs[model] = StepProgram(model, layers)
    answer_by_operations(model, program.operations)
    return program


def _layers(model: PreTrainedModel) -> list[Any]:
    """Empty: a program can't compute them."""
    family = family_of(model.config)
    kind, sizes = family.pre_norm_layer, family.dimensions(model.config)
    if kind is None or model.dtype != torch.bfloat16 or not family.gates_with_silu(model.config):
        return []
    rotary = 2 * model.base_model.rotary_emb.inv_freq.numel()
    if any(width % MULTIPLE for width in (sizes.hidden, sizes.head_dim, sizes.ffn, rotary)):
        return []
    layers = [part for part in model.modules() if isinstance(part, kind)]
    linears = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
    packed = all(isinstance(part, PackedLinear) and isinstance(part.packed, Compiled) for part in linears)
    return layers if packed and len(linears) == 6 * len(layers) else []


class StepProgram:
    """Args:
    model: whose embedding, rotary and last norm it takes.
    layers: of norm, attention with rotary in pairs of neighbours, norm and feed-forward part, all products compiled.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Any]):
        body: Any = model.base_model
        self.layers, self.sizes = layers, family_of(model.config).dimensions(model.config)
        self._embed, self._rotary, self._last = model.get_input_embeddings(), body.rotary_emb, body.norm
        self.operations = Operations(layers[0].self_attn.q_proj.packed.lanes)
        self._room: dict[str, torch.Tensor] = {}
        self._programs: dict[int, torch.Tensor] = {}  # by rows
        self._made_for: tuple = ()

    def __call__(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, store: torch.Tensor, columns_N: torch.Tensor
    ) -> torch.Tensor:
        """Computes a token of each of the first N rows, and writes its keys and values.

        Args:
            ids_N: the tokens.
            positions_N: theirs.
            store: (L, 2, rows, G, C, D) of keys and values.
            columns_N: in use of each row; the token gets the next one.

        Returns:
            (N, H), what the output layer takes.
        """
        rows = len(ids_N)
        embedded = self._embed(ids_N)
        cos, sin = (each[0, :, : each.shape[-1] // 2] for each in self._rotary(embedded, positions_N[None]))
        self._prepare(rows, store)
        room = self._room
        room["x"][:rows] = embedded
        for name, each in (("cos", cos), ("sin", sin)):
            room[name][:rows] = each.repeat_interleave(2, dim=-1)
        room["columns"][:rows] = columns_N
        room["lengths"][:rows] = columns_N + 1
        self.operations.run(self._programs[rows])
        return room["normal"][:rows].clone()

    def _prepare(self, rows: int, store: torch.Tensor) -> None:
        """Makes the program where it isn't there."""
        threads = torch.get_num_threads()
        made_for = (store.data_ptr(), store.shape, threads)
        if made_for != self._made_for:
            self._programs.clear()
            self._make_room(store.shape[2], store.shape[4], threads)
            self._made_for = made_for
        if rows not in self._programs:
            self._programs[rows] = self.operations.program(self._records(rows, store), threads)

    def _make_room(self, rows: int, columns: int, threads: int) -> None:
        sizes, rotary = self.sizes, 2 * self._rotary.inv_freq.numel()
        widths = {
            "x": sizes.hidden,
            "normal": sizes.hidden,
            "query": sizes.query,
            "key": sizes.key,
            "value": sizes.key,
            "seen": sizes.query,
            "added": sizes.hidden,
            "gate_up": 2 * sizes.ffn,
            "gated": sizes.ffn,
            "cos": rotary,
            "sin": rotary,
        }
        self._room = {name: torch.empty(rows, width, dtype=torch.bfloat16) for name, width in widths.items()}
        self._room |= {name: torch.empty(rows, dtype=torch.int64) for name in ("columns", "lengths")}
        widest = product_bytes(rows, max(sizes.hidden, sizes.query, sizes.ffn))
        self._room["rounded"] = torch.empty(widest, dtype=torch.uint8)
        of_one = room_bytes(columns, sizes.head_dim, self.operations.lanes)
        self._room["scores"] = torch.empty(threads, of_one, dtype=torch.uint8)

    def _records(self, rows: int, store: torch.Tensor) -> list[Record]:
        records: list[Record] = []
        room, added = self._room, 0  # nothing is added before the first norm
        for layer, (keys, values) in zip(self.layers, store, strict=True):
            attention, feed_forward = layer.self_attn, layer.mlp
            records.append(self._norm(layer.input_layernorm, rows, added))
            projections = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            records += self._products(rows, "normal", projections)
            records += self._attention(rows, keys, values, attention.scaling)
            records += self._products(rows, "seen", {"added": attention.o_proj})
            added = room["added"].data_ptr()
            records.append(self._norm(layer.post_attention_layernorm, rows, added))
            records += self._products(rows, "normal", {"gate_up": feed_forward.gate_up_proj})
            gate_up, gated = room["gate_up"].data_ptr(), room["gated"].data_ptr()
            records.append(self.operations.record("gate", gate_up, gated, rows, self.sizes.ffn))
            records += self._products(rows, "gated", {"added": feed_forward.down_proj})
        return [*records, self._norm(self._last, rows, added)]

    def _norm(self, norm: Any, rows: int, added: int) -> Record:
        x, normal = self._room["x"].data_ptr(), self._room["normal"].data_ptr()
        told = (x, added, norm.weight.data_ptr(), normal, rows, self.sizes.hidden, bits(norm.variance_epsilon))
        return self.operations.record("norm", *told)

    def _products(self, rows: int, source: str, linears: dict[str, Any]) -> list[Record]:
        """Of one input: its rows are rounded once, and all products are computed as one."""
        x, rounded, records = self._room[source], self._room["rounded"], []
        last = len(linears) - 1
        for n, (target, linear) in enumerate(linears.items()):
            told = linear.packed.arguments(x, self._room[target], rounded, rows, x.shape[1], torch.get_num_threads())
            if n == 0:
                records.append(self.operations.record(linear.packed.functions["quantise"], *told))
            records.append(self.operations.record(linear.packed.functions["product"], *told, wait=n == last))
        return records

    def _attention(self, rows: int, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> list[Record]:
        sizes, room = self.sizes, self._room
        query = room["query"].view(-1, sizes.heads, sizes.head_dim)
        told = attend_arguments(query[:rows], keys, values, room["lengths"], room["seen"], room["scores"], scaling)
        names = ("query", "key", "value", "cos", "sin")
        slot, group = (keys.element_size() * keys.stride(n) for n in range(2))
        rotate = self.operations.record(
            "rotate",
            *(room[name].data_ptr() for name in names),
            *(keys.data_ptr(), values.data_ptr(), room["columns"].data_ptr()),
            *(slot, group, rows, sizes.groups, sizes.heads, sizes.head_dim, room["cos"].shape[1]),
        )
        return [rotate, self.operations.record("attend", *told)]
