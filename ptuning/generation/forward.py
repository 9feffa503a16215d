"""One forward call over some rows of the batch: their new tokens in, the logits of their last ones out."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.families.logits import logits_at
from ptuning.generation.row import Row
from ptuning.generation.slots import SlotCache
from ptuning.methods import Companion


class Forward:
    """Computes tokens that aren't in the cache yet, and counts them as cached.

    Args:
        model: bare, in eval mode.
        cache: where the rows have their slots.
    """

    apart = False  # whether the model's attention knows of layouts (together.py)

    def __init__(self, model: PreTrainedModel, cache: SlotCache):
        self.model, self.cache = model, cache

    def logits(self, rows: Sequence[Row], first: int, new: Sequence[list[int]]) -> torch.Tensor:
        """Each row's new tokens.

        Args:
            rows: whose.
            first: the slot of the first one; the others follow.
            new: the tokens of each.

        Returns:
            (rows, V) in fp32: of each row's last token.
        """
        longest, device = max(map(len, new)), self.model.device
        starts = torch.tensor([row.start for row in rows], device=device)
        positions = torch.tensor([row.cached for row in rows])[:, None] + torch.arange(longest)
        newest = torch.tensor([len(ids) - 1 for ids in new], device=device)
        layout = self.cache.begin_apart(starts) if self.apart and longest == 1 and first == 0 else None
        mask = self.cache.begin(first, starts, longest) if layout is None else layout.rows_mask
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

    def logits_together(self, rows: Sequence[Row], prompt: Row, piece: list[int]) -> torch.Tensor:
        """Every running row's newest token, and a piece of the prompt in the slot behind them (together.py).

        Returns:
            (rows + 1, V) in fp32: of each row's token, and of the piece's last one.
        """
        device, count = self.model.device, len(rows)
        ids = [row.ids[-1] for row in rows] + piece
        positions = [row.cached for row in rows] + list(range(prompt.cached, prompt.cached + len(piece)))
        starts = torch.tensor([row.start for row in rows], device=device)
        layout = self.cache.begin_together(starts, prompt.start, len(piece))
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
