"""The next token of each row, chosen by the row's own rule and its own random numbers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptuning.generation.protocol import SamplingParams

# A logit divided by a tiny penalty, and then by a low temperature, must stay a number: infinite ones make no distribution.
_LARGEST = 1e30


class Chooser:
    """The rule of one row. Keeps its random state and what it has generated, for the penalties.

    Args:
        sampling: the rule.
        prompt: tokens that were there before.
    """

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int] = ()):
        self.sampling = sampling
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self.counts: Counter[int] = Counter()
        self.matcher = None if sampling.constraint is None else sampling.constraint.matcher()
        self.random = None
        if sampling.temperature > 0:
            self.random = torch.Generator()
            if sampling.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed(sampling.seed % 2**63)

    def penalise(self, logits_V: torch.Tensor) -> None:
        """Takes the penalties off, and what may not come, in place."""
        if self.seen:
            seen = torch.tensor(sorted(self.seen), device=logits_V.device)
            of_seen, penalty = logits_V[seen], self.sampling.repetition_penalty
            logits_V[seen] = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        if self.sampling.penalised and self.counts:
            self._penalise_counts(logits_V)
        if self.matcher is not None:
            self.matcher.restrict(logits_V)

    def chose(self, token: int) -> None:
        """Remembers what was chosen."""
        if self.sampling.penalised:
            self.counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self.seen.add(token)
        if self.matcher is not None:
            self.matcher.chose(token)

    def _penalise_counts(self, logits_V: torch.Tensor) -> None:
        tokens = torch.tensor(list(self.counts), device=logits_V.device)
        times = torch.tensor(list(self.counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V[tokens] -= self.sampling.frequency_penalty * times + self.sampling.presence_penalty


def choose(logits_NV: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One token a row.

    Args:
        logits_NV: fp32; penalties are taken off in place.
        choosers: one a row; they remember what was chosen.
    """
    for logits_V, chooser in zip(logits_NV, choosers, strict=True):
        chooser.penalise(logits_V)
    logits_NV.clamp_(max=_LARGEST)
    chosen = logits_NV.argmax(-1)
    groups: dict[tuple, list[tuple[int, torch.Generator]]] = {}
    for row, chooser in enumerate(choosers):
        if chooser.random is not None:
            sampling = chooser.sampling
            rule = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            groups.setdefault(rule, []).append((row, chooser.random))
    for rule, members in groups.items():
        rows = [row for row, _ in members]
        chosen[rows] = _draw(_warpers(*rule)(None, logits_NV[rows]), [random for _, random in members])
    tokens = chosen.tolist()
    for token, chooser in zip(tokens, choosers, strict=True):
        chooser.chose(token)
    return tokens


@lru_cache(maxsize=256)
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """transformers' own, in the order in which its generate applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def _draw(logits_NV: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """One number of each row's own generator picks from its distribution, on any device the same."""
    cumulative_NV = logits_NV.double().softmax(-1).cumsum(-1)
    numbers_N1 = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])[:, None]
    # Scaled by the sum, which rounding keeps off 1, and kept below it, where the first token of weight 0 might lie.
    targets_N1 = numbers_N1.to(logits_NV.device) * cumulative_NV[:, -1:] * (1 - 1e-12)
    return torch.searchsorted(cumulative_NV, targets_N1, right=True)[:, 0]
