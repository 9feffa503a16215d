"""What answers requests: the protocol that evaluation, chat and serving use, whatever computes the tokens."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ptuning.methods import Companion


class Matcher(Protocol):
    """What one answer may be, token by token."""

    def restrict(self, logits_V: Tensor) -> None:
        """Sets the logits of tokens that may not come next to -inf, in place. An end token may come where the answer is whole."""

    def chose(self, token: int) -> None:
        """Goes on by the token that was chosen."""


class Constraint(Protocol):
    """A form that an answer must have, e.g. JSON of a schema."""

    def matcher(self) -> Matcher:
        """For one more answer."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy, and then top_p, top_k and seed have nothing to do.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        seed: of this row's own random numbers; None draws one. The same seed gives the same answer whatever else is in
            the batch.
        frequency_penalty: taken off a token's logit for each time it was generated (OpenAI's definition).
        presence_penalty: taken off once a token was generated at all.
        min_p: drop tokens less likely than this times the likeliest; 0 drops none.
        repetition_penalty: divides a positive logit, and multiplies a negative one, of a token that is in the prompt or was
            generated (transformers' definition); 1 changes nothing.
        constraint: a form that the answer must have.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    constraint: Constraint | None = None

    @property
    def penalised(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty)


GREEDY = SamplingParams()
# What the official ptuning/main.py passes to generate (transformers' own default there is top_k 50).
OFFICIAL = SamplingParams(temperature=0.95, top_p=0.7, top_k=50)


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One prompt to answer.

    Args:
        id: names the request in the tokens that come back; unique among those that run.
        ids: the prompt's tokens, begin tokens included.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen.
        prefix: what it is answered with, a prefix or a LoRA; None is the untuned base.
        logprobs: report the chosen token's log probability and those of this many likeliest tokens.
    """

    id: Hashable
    ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    prefix: Companion | None = None
    logprobs: int | None = None

    @property
    def before(self) -> int:
        """Cache columns in front of the prompt."""
        return self.prefix.length if self.prefix else 0

    @property
    def room(self) -> int:
        """Cache columns the row may need: prefix, prompt and answer."""
        return self.before + len(self.ids) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One step of one request.

    Args:
        id: the request's.
        token: None where the model ended the answer.
        finish: None while it goes on; stop: the model ended it; length: max_new_tokens are there.
        logprob: of the chosen token under the model, before temperature and the like; only where asked for.
        top: (token, log probability) of the likeliest; only where asked for.
        reused: with an answer's first token: how many tokens of its prompt weren't computed, because their keys and values were
            there from another request that begins alike.
    """

    id: Hashable
    token: int | None
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = field(default=())
    reused: int = 0


class Generator(AbstractContextManager, Protocol):
    """Answers requests, in any order and side by side. Use it as `with generator:`."""

    def submit(self, requests: Iterable[GenerationRequest], anywhere: Callable[[bool], bool] = bool) -> Iterator[Token]:
        """Answers all of them; a request's last token has a `finish`.

        Args:
            anywhere: given whether this process has work, whether any process has. Under ZeRO-3 all processes gather each
                layer together, so that one that is done computes idle steps until the others are done too.

        Raises:
            ValueError: a request that can't be computed.
            GenerationError: one that doesn't fit into memory, even alone.
        """
        ...
