"""What makes the base answer a request as something tuned would."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel


class Companion:
    """What a request brings along that is answered with something tuned beside the base. Two are the same only if they are the
    same object.

    Args:
        name: for the caller.
    """

    name: str
    length = 0  # columns of a row's cache in front of its own
    key_values: torch.Tensor | None = None  # of those: (L, 2, G, length, D), keys without rotary

    def on(self, model: PreTrainedModel, rows: Sequence[int]) -> AbstractContextManager:
        """Inside, a forward call of the bare model computes these rows of the batch with it."""
        return nullcontext()

    @property
    def in_layers(self) -> bool:
        """Whether layers compute something else with it."""
        return type(self).on is not Companion.on
