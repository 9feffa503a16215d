"""One forward call over some rows of the batch: their new tokens in, the logits of their last ones out."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.families.logits import logits_at
from ptuning.generation.row import Row
from ptuning.generation.slots import SlotCache
from ptuning.generation.together import Attend, Layout
from ptuning.kernels import StepProgram
from ptuning.methods import Companion


class Forward:
    """Computes tokens that aren't in the cache yet, and counts them as cached.

    Args:
        model: bare, in eval mode.
        cache: where the rows have their slots.
    """

    apart = False  # whether the model's attention knows of layouts (together.py)
    step: StepProgram | None = None  # which computes running rows where it can

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        self.model, self.cache = model, cache

    def next_logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Of the running rows' newest tokens: (rows, V) in fp32."""
        starts = torch.tensor([row.start for row in rows], device=self.model.device)
        if self.step is not None and not any(row.request.prefix and row.request.prefix.in_layers for row in rows):
            ids, positions = torch.tensor([[row.ids[row.cached], row.cached] for row in rows]).t()
            hidden_NH = self.step(ids, positions, self.cache.store, starts)
            for row in rows:
                row.cached += 1
            return self.model.get_output_embeddings()(hidden_NH).float()
        layout = self.cache.begin_apart(starts, self._attend(starts)) if self.apart else None
        mask = self.cache.begin(0, starts, 1) if layout is None else layout.rows_mask
        return self._logits(rows, [row.ids[row.cached :] for row in rows], mask, layout)

    def logits(self, rows: Sequence[Row], first: int, new: Sequence[list[int]]) -> torch.Tensor:
        """Tokens of prompts.

        Args:
            rows: whose.
            first: the slot of the first one; the others follow.
            new: the tokens of each.

        Returns:
            (rows, V) in fp32: of each row's last token.
        """
        starts = torch.tensor([row.start for row in rows], device=self.model.device)
        return self._logits(rows, new, self.cache.begin(first, starts, max(map(len, new))))

    def _logits(
        self, rows: Sequence[Row], new: Sequence[list[int]], mask: torch.Tensor, layout: Layout | None = None
    ) -> torch.Tensor:
        longest, device = max(map(len, new)), self.model.device
        positions = torch.tensor([row.cached for row in rows])[:, None] + torch.arange(longest)
        newest = torch.tensor([len(ids) - 1 for ids in new], device=device)
        with (
            _companions(self.model, rows),
            logits_at(self.model, torch.arange(longest, device=device) == newest[:, None]),
        ):
            logits_NV = self.model(
                input_ids=torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=device),
                attention_mask=mask,
                position_ids=positions.to(device),
                past_key_values=self.cache,
                **({} if layout is None else {"layout": layout}),
            ).logits.float()
        for row, ids in zip(rows, new, strict=True):
            row.cached += len(ids)
        return logits_NV

    def _attend(self, starts: torch.Tensor) -> Attend | None:
        return None if self.step is None else partial(self.step.operations.attend, lengths_N=starts + 1)

    def logits_together(self, rows: Sequence[Row], prompt: Row, piece: list[int]) -> torch.Tensor:
        """Every running row's newest token, and a piece of the prompt in the slot behind them (together.py).

        Returns:
            (rows + 1, V) in fp32: of each row's token, and of the piece's last one.
        """
        device, count = self.model.device, len(rows)
        ids = [row.ids[-1] for row in rows] + piece
        positions = [row.cached for row in rows] + list(range(prompt.cached, prompt.cached + len(piece)))
        starts = torch.tensor([row.start for row in rows], device=device)
        layout = self.cache.begin_together(starts, prompt.start, len(piece), self._attend(starts))
        wanted = torch.arange(len(ids), device=device)
        with (
            _companions(self.model, [*rows, *([prompt] * len(piece))]),
            logits_at(self.model, ((wanted < count) | (wanted == len(ids) - 1))[:, None]),
        ):
            logits_NV = self.model(
                input_ids=torch.tensor(ids, device=device)[:, None],
                attention_mask=layout.rows_mask,
                position_ids=torch.tensor(positions, device=device)[:, None],
                past_key_values=self.cache,
                layout=layout,
            ).logits.float()
        for row in rows:
            row.cached += 1
        prompt.cached += len(piece)
        return logits_NV

    def idle(self) -> None:
        """A call without a request: under ZeRO-3 all processes gather each layer together."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device))


def inference() -> AbstractContextManager:
    """Inside, no gradients are kept. ZeRO-3 keeps gathered weights for training, where inference tensors can't be used."""
    return torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode()


@contextmanager
def _companions(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[None]:
    """Inside, each row is computed with what its request brings along."""
    places: dict[Companion, list[int]] = {}
    for index, row in enumerate(rows):
        if row.request.prefix is not None:
            places.setdefault(row.request.prefix, []).append(index)
    with ExitStack() as stack:
        for companion, indices in places.items():
            stack.enter_context(companion.on(model, indices))
        yield
