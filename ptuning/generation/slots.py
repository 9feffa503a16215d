"""The key/value cache of a batch whose rows come and go.

A row has its prefix, prompt and answer in columns 0, 1, 2, … of its own slot. Rows in use are always the first ones, so
that each step works on one dense slice.

Shapes: L layers, R rows, G key/value groups, C columns, D head dimension, S new tokens a row.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ptuning.distributed import own_heads
from ptuning.errors import GenerationError
from ptuning.families import Dimensions, family_of
from ptuning.generation.together import Attend, Layout, spans

_COLUMNS = 128  # columns are added in steps of this many


def row_dimensions(config: PreTrainedConfig) -> Dimensions:
    """Widths of a model whose rows can be computed in pieces, side by side.

    Raises:
        GenerationError: it isn't such a model.
    """
    family = family_of(config)
    if family.engine_refusal:
        raise GenerationError(family.engine_refusal)
    return family.dimensions(config)


class _Slice(CacheLayerMixin):
    """One layer of the rows that take part in a forward call."""

    def __init__(self, owner: "SlotCache", layer: int):
        super().__init__()
        self.owner, self.layer = owner, layer

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to do: the owner allocates before each call."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes (n, G, S, D) behind what each row has, and returns the rows' (n, G, columns in use, D) where they came from."""
        layer_device, own_device = key_states.device, self.owner.store.device
        key_states, value_states = key_states.to(own_device), value_states.to(own_device)
        places, width = self.owner.places, self.owner.width
        keys, values = self.owner.store[self.layer, :, self.owner.rows]
        count = len(places[0])
        for store, states in ((keys, key_states), (values, value_states)):
            # Not scatter_, which in 16 bit copies all slots.
            store.transpose(1, 2).index_put_(places, states[:count].transpose(1, 2))
            if self.owner.piece is not None:
                start, stop = self.owner.piece
                store[count, :, start:stop] = states[count:, :, 0].transpose(0, 1)
        return keys[:, :, :width].to(layer_device), values[:, :, :width].to(layer_device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.width, 0

    def get_seq_length(self) -> int:
        return self.owner.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Slots for rows of different lengths.

    Args:
        layers: L.
        groups: G.
        head_dim: D.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(self, layers: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[_Slice(self, layer) for layer in range(layers)])
        self.piece: tuple[int, int] | None = None  # first and last column of a prompt's that is computed beside rows
        self.store = torch.zeros(layers, 2, 0, groups, 0, head_dim, dtype=dtype, device=device)

    def reserve(self, rows: int, columns: int, keep: Sequence[int], budget: int) -> None:
        """Makes room for `rows` rows of `columns` columns.

        Args:
            keep: of each of the first rows, the columns whose contents stay.
            budget: spare rows and columns, so that growing is rare, stay within this many tokens.
        """
        layers, two, had_rows, groups, had_columns, head_dim = self.store.shape
        if rows <= had_rows and columns <= had_columns:
            return
        columns = -(-columns // _COLUMNS) * _COLUMNS
        if had_columns < columns and keep:  # by a fifth at least, so that a long answer isn't copied too often
            spare = min(had_columns * 6 // 5, budget // rows) // _COLUMNS * _COLUMNS
            columns = max(columns, spare)
        rows = max(rows, min(2 * rows, budget // columns))
        had = self.store
        # Zeros, not empty memory: a masked column weighs 0, and 0 times NaN would still be NaN.
        self.store = _zeros(self.store, (layers, two, rows, groups, columns, head_dim))
        for row, used in enumerate(keep):
            self.store[:, :, row, :, :used] = had[:, :, row, :, :used]

    def clear(self) -> None:
        """Gives the memory back."""
        self.store = self.store[:, :, :0, :, :0].clone()

    def begin(self, first: int, starts: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Prepares one forward call for the rows first, first + 1, ….

        Args:
            first: of the rows.
            starts: (n,) columns in use of each row.
            new_tokens: S; shorter rows are padded on the right.

        Returns:
            The mask (n, 1, S, columns): a token sees its prefix, its past and itself.
        """
        count = len(starts)
        self.rows, self.piece = slice(first, first + count), None
        self.width = int(starts.max()) + new_tokens
        columns = starts[:, None] + torch.arange(new_tokens, device=starts.device)
        self.places = torch.arange(count, device=starts.device)[:, None], columns
        return (torch.arange(self.width, device=starts.device) <= columns[:, :, None])[:, None]

    def begin_apart(self, starts: torch.Tensor, attend: Attend | None) -> Layout | None:
        """Prepares a forward call of the first rows' next tokens which `attend` computes, or whose lengths differ so much that
        short ones are better computed apart from long ones; None where neither is so.

        Args:
            starts: (n,) columns in use of each row.
            attend: of a layout.
        """
        apart = _apart(starts) if attend is None else []
        if len(apart) == 1:
            return None
        return Layout(len(starts), self.begin(0, starts, 1), apart, attend=attend)

    def begin_together(self, starts: torch.Tensor, start: int, new_tokens: int, attend: Attend | None = None) -> Layout:
        """Prepares a forward call of the first rows' next tokens and a piece of the prompt in the slot behind them, which takes
        and gives keys and values of N = n + new_tokens single tokens.

        Args:
            starts: (n,) columns in use of each row.
            start: of the prompt.
            new_tokens: of the prompt.
            attend: of a layout.
        """
        rows_mask = self.begin(0, starts, 1)
        stop, device = start + new_tokens, starts.device
        self.rows, self.piece = slice(0, len(starts) + 1), (start, stop)
        self.width = max(self.width, stop)
        ahead = torch.arange(stop, device=device) > torch.arange(start, stop, device=device)[:, None]
        piece_mask = torch.zeros(ahead.shape, dtype=self.store.dtype, device=device).masked_fill_(ahead, -torch.inf)
        apart = _apart(starts) if attend is None else []
        return Layout(len(starts), rows_mask, apart, piece_mask[None, None], attend)

    def put(self, row: int, start: int, key_values: torch.Tensor) -> None:
        """Writes (L, 2, G, n, D), of which this process may have a share, into a row from column `start` on."""
        own = own_heads(key_values, self.store.shape[3], 2)
        self.store[:, :, row, :, start : start + own.shape[3]] = own

    def take(self, row: int, start: int, stop: int) -> torch.Tensor:
        """A copy of a row's columns: (L, 2, G, stop - start, D)."""
        return self.store[:, :, row, :, start:stop].clone()

    def move(self, source: int, target: int, columns: int) -> None:
        """Copies the first columns of one row over another."""
        self.store[:, :, target, :, :columns] = self.store[:, :, source, :, :columns]


def _apart(starts: torch.Tensor) -> list[tuple[int, int, int]]:
    """Spans of rows that take their next tokens."""
    return spans([start + 1 for start in starts.tolist()], starts.device)


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of another tensor's kind. On a CPU as pages of the system, which come when they are first touched: torch writes all of
    them at once, and half a gigabyte is a third of a second in which no answer goes on, for rows that may never be used."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    try:
        pages = mmap.mmap(-1, math.prod(shape) * like.element_size())
    except OSError as error:
        raise MemoryError(f"out of memory: {error}") from error
    if hasattr(
        mmap, "MADV_NOHUGEPAGE"
    ):  # pages of 2 MB hold columns of several rows, and all would be written at once again
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
