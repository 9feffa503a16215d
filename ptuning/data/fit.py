"""A dialogue made to fit into so many tokens, in one way for training, evaluation and serving.

The oldest turns go first. What is too long is never tokenised whole, and the number of tokenizer calls doesn't grow with the
number of turns: their tokens are estimated in one call, and the choice is checked by encoding it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ptuning.errors import DataError
from ptuning.families import Dialogue, Encoded, Segment, Template

_GUESSES = 4  # by the estimate; after them the interval of what is left is halved


@dataclass(frozen=True, slots=True)
class FitPolicy:
    """What may be left out of a dialogue that is too long, beside its oldest turns.

    Args:
        drop_system: a system text that takes more than half of the room, before anything else.
        cut_question: of a question that is too long without any turns, what the template says; else that is an error.
        room: tokens below the limit that stay free for the answer as long as there are turns to drop. With 0 the limit is the
            prompt's own; else it is that of prompt and answer together, and at least one token stays free.
    """

    drop_system: bool = False
    cut_question: bool = False
    room: int = 0


CUT = FitPolicy(drop_system=True, cut_question=True)  # training and evaluation: every row is used


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt that fits.

    Args:
        encoded: its ids and segments.
        dropped_system: its system text was left out.
        dropped_turns: so many of the oldest turns were left out.
        cut_question: some of its question was left out.
    """

    encoded: Encoded
    dropped_system: bool = False
    dropped_turns: int = 0
    cut_question: bool = False

    @property
    def ids(self) -> list[int]:
        """Of the prompt, from the begin ids to where the answer starts."""
        return self.encoded.ids


class PromptTooLong(DataError):
    """A question doesn't fit, not even without any turns before it.

    Args:
        tokens: of the prompt; None where it is so long that they weren't counted.
        limit: what it exceeds, in tokens.
    """

    def __init__(self, tokens: int | None, limit: int):
        size = f"more than {limit}" if tokens is None else str(tokens)
        super().__init__(
            f"the prompt has {size} tokens without any history, and the limit is {limit}; shorten the text"
        )
        self.tokens, self.limit = tokens, limit


def fit(template: Template, dialogue: Dialogue, limit: int, policy: FitPolicy = CUT) -> Fitted:
    """The dialogue's prompt, with as much of it as fits.

    Args:
        template: writes and encodes it.
        dialogue: its response is not part of the prompt.
        limit: in tokens, begin ids included.
        policy: what may be left out.

    Raises:
        PromptTooLong: the policy doesn't let the question be cut.
    """
    return fit_all(template, [dialogue], limit, policy)[0]


def fit_all(template: Template, dialogues: Sequence[Dialogue], limit: int, policy: FitPolicy = CUT) -> list[Fitted]:
    """`fit` for many dialogues; those that fit are encoded in one call."""
    fitters = [_Fitter(template, replace(dialogue, response=None), limit, policy) for dialogue in dialogues]
    short = [fitter for fitter in fitters if fitter.may_fit(0)]
    encoded = template.encode([template.render(fitter.dialogue) for fitter in short]) if short else []
    for fitter, found in zip(short, encoded, strict=True):
        fitter.seen[0] = found
    return [fitter.result() for fitter in fitters]


class _Fitter:
    """One dialogue on its way to fit. `seen` holds what was encoded, by the number of dropped turns."""

    def __init__(self, template: Template, dialogue: Dialogue, limit: int, policy: FitPolicy):
        self.template, self.dialogue, self.policy = template, dialogue, policy
        self.most = limit - (policy.room > 0)  # tokens of a prompt without turns
        self.target = limit - policy.room  # of one with turns
        self.longest_text = limit * template.longest_token  # in characters
        self.turns = len(dialogue.history)
        sizes = (len(question) + len(answer) for question, answer in reversed(dialogue.history))
        self.sizes = [*accumulate(sizes, initial=0)]  # characters of the newest 0, 1, … turns
        self.seen: dict[int, Encoded] = {}

    def may_fit(self, dropped: int) -> bool:
        """False where the text has more characters than the limit's tokens can hold."""
        whole = self.dialogue
        others = len(whole.prompt) + len(whole.system or "") + len(whole.source_prefix)
        return others + self.sizes[self.turns - dropped] <= self.longest_text

    def result(self) -> Fitted:
        whole = self.seen.get(0)
        if whole is not None and len(whole.ids) <= (self.target if self.turns else self.most):
            return Fitted(whole)
        estimate = _Estimate(self) if self.turns or (self.policy.drop_system and self.dialogue.system) else None
        dropped_system = estimate is not None and estimate.system_is_large
        if dropped_system:
            self.dialogue, self.seen = replace(self.dialogue, system=None), {}
        dropped = self._turns_to_drop(estimate, known=-1 if dropped_system else 0) if estimate and self.turns else 0
        if dropped not in self.seen and self.may_fit(dropped):
            self._encode([dropped])
        encoded, cut = self.seen.get(dropped), False
        if encoded is None or len(encoded.ids) > self.most:
            if not self.policy.cut_question:
                raise PromptTooLong(None if encoded is None else len(encoded.ids), self.most)
            encoded, cut = self._cut_question(), True
        return Fitted(encoded, dropped_system, dropped, cut)

    def _turns_to_drop(self, estimate: _Estimate, known: int) -> int:
        """The fewest with which the prompt fits; all of them where none does.

        Args:
            known: the most that are known to be too few; -1 where nothing is known.
        """
        low, high, guesses, excess = known, self.turns, 0, 0.0
        while high - low > 1:
            guess = estimate.turns_to_drop(self.target, excess) if guesses < _GUESSES else (low + high) // 2
            guess = min(max(guess, low + 1), high)
            guesses += 1
            # Beside the guess the one below it, which must not fit.
            wanted = [dropped for dropped in (guess - 1, guess) if low < dropped < high]
            self._encode([dropped for dropped in wanted if self.may_fit(dropped)])
            for dropped in wanted:
                encoded = self.seen.get(dropped)
                if encoded is not None:
                    excess = (len(encoded.ids) - estimate.tokens(dropped)) / (self.turns - dropped)
                if encoded is not None and len(encoded.ids) <= self.target:
                    high = min(high, dropped)
                else:
                    low = max(low, dropped)
        return high

    def _encode(self, numbers: Sequence[int]) -> None:
        """Encodes the dialogue without so many old turns, for each number, in one call."""
        history = self.dialogue.history
        rows = [self.template.render(replace(self.dialogue, history=history[dropped:])) for dropped in numbers]
        if rows:
            self.seen |= zip(numbers, self.template.encode(rows), strict=True)

    def _cut_question(self) -> Encoded:
        """The prompt with as much of the question as fits, without turns; what is kept is the template's matter. Length grows
        with the characters kept, nearly always."""
        dialogue = replace(self.dialogue, history=())
        room = self.longest_text - len(dialogue.system or "") - len(dialogue.source_prefix)

        def kept(count: int) -> Encoded | None:
            if count > room:
                return None
            question = self.template.shortened(dialogue.prompt, count)
            return self.template.encode([self.template.render(replace(dialogue, prompt=question))])[0]

        low, high, best = 0, len(dialogue.prompt), None
        while low < high:
            middle = (low + high + 1) // 2
            found = kept(middle)
            if found is not None and len(found.ids) <= self.most:
                low, best = middle, found
            else:
                high = middle - 1
        return best or self.template.encode([self.template.render(replace(dialogue, prompt=""))])[0]


class _Estimate:
    """What the parts of a dialogue take in tokens, each encoded by itself, all in one call. Beside each other they may take
    some tokens more or fewer."""

    def __init__(self, fitter: _Fitter):
        dialogue = fitter.dialogue
        empty = Dialogue("", source_prefix=dialogue.source_prefix)
        system = dialogue.system or ""
        # Turns that can't fit, by their characters, aren't even estimated.
        newest = next((n for n in range(fitter.turns, 0, -1) if fitter.sizes[n] <= fitter.longest_text), 0)
        kept = dialogue.history[fitter.turns - newest :]
        frames = [
            empty,
            replace(empty, history=(("", ""),)),
            replace(empty, system=system if len(system) <= fitter.longest_text else None),
            replace(empty, prompt=dialogue.prompt if len(dialogue.prompt) <= fitter.longest_text else ""),
        ]
        texts = [text for turn in kept for text in turn]
        rows = [fitter.template.render(frame) for frame in frames] + [[Segment(text)] for text in texts]
        counts = [len(encoded.ids) for encoded in fitter.template.encode(rows)]
        (shortest, one_turn, with_system, with_question), of_texts = counts[:4], counts[4:]
        self.system_is_large = bool(system and fitter.policy.drop_system) and (
            len(system) > fitter.longest_text or 2 * (with_system - shortest) > fitter.most - shortest
        )
        self.without_turns = with_question + (0 if self.system_is_large else with_system - shortest)
        per_turn = [sum(pair) + one_turn - shortest for pair in zip(of_texts[::2], of_texts[1::2], strict=True)]
        self.newest = [*accumulate(reversed(per_turn), initial=0)]  # tokens of the newest 0, 1, … turns
        self.turns = fitter.turns

    def tokens(self, dropped: int) -> int:
        """Of the prompt without so many old turns, which must be among those that can fit."""
        return self.without_turns + self.newest[self.turns - dropped]

    def turns_to_drop(self, target: int, excess: float) -> int:
        """The fewest with which the prompt should fit.

        Args:
            target: tokens.
            excess: what a turn was found to take beyond the estimate.
        """
        fitting = [n for n, tokens in enumerate(self.newest) if self.without_turns + tokens + n * excess <= target]
        return self.turns - (fitting[-1] if fitting else 0)
