"""Tokens → text as it may be shown: whole characters, nothing of a stop string, no blanks around it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.families import Template
from ptuning.generation import Token

_BROKEN = "\ufffd"  # what an unfinished character decodes to


class Detokenizer:
    """Text of a growing answer. The pieces joined are what decoding all tokens at once gives.

    Decodes only the tokens since the text before the latest, so that a long answer doesn't cost its square.
    """

    def __init__(self, template: Template):
        self.template = template
        self.ids: list[int] = []
        self.context = self.done = 0  # tokens whose text is out, and those before the latest of it

    def push(self, token: int) -> str:
        """Text that is certain now; empty while a character is unfinished."""
        self.ids.append(token)
        text = self._rest()
        if not text or text.endswith(_BROKEN):
            return ""
        self.context, self.done = self.done, len(self.ids)
        return text

    def finish(self) -> str:
        """What is left. A character that was cut off at the end is left out."""
        return self._rest().rstrip(_BROKEN)

    def _rest(self) -> str:
        before = self.template.decode(self.ids[self.context : self.done])
        return self.template.decode(self.ids[self.context :])[len(before) :]


class StopStrings:
    """Lets text through up to the first stop string; holds back what could be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Blanks:
    """Takes the blanks off both ends of a text that comes in pieces, as evaluation does before scoring."""

    def __init__(self):
        self.begun = False
        self.held = ""

    def push(self, text: str) -> str:
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        text = self.held + text
        shown = text.rstrip()
        self.held = text[len(shown) :]
        return shown


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Args:
        text: new text.
        tokens: the tokens of it, with their log probabilities where asked for.
        starts: where each of these tokens begins in the whole text.
        finish: stop or length in the last piece, else None.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    starts: tuple[int, ...] = ()
    finish: str | None = None


class AnswerText:
    """Turns an answer's tokens into pieces of text.

    Args:
        template: of the base.
        stops: strings that end the answer and aren't part of it.
        strip: take blanks off both ends.
    """

    def __init__(self, template: Template, stops: Sequence[str] = (), strip: bool = True):
        self._detokenizer, self._stops = Detokenizer(template), StopStrings(stops)
        self._blanks = _Blanks() if strip else None
        self._pending: list[tuple[int, Token]] = []  # (start, token) whose text isn't out
        self._made = 0  # characters decoded
        self._out = 0  # of those, let through
        self.tokens = 0

    def push(self, token: Token) -> Piece:
        """Takes the engine's next token. Nothing may follow a piece that has a finish."""
        if token.token is not None:
            self.tokens += 1
            self._pending.append((self._made, token))
            text = self._detokenizer.push(token.token)
            self._made += len(text)
            shown = self._stops.push(text)
            if self._stops.stopped:
                return self._last(shown, "stop")
            if token.finish is None:
                return self._piece(shown)
        else:
            shown = ""
        rest = self._detokenizer.finish()
        shown += self._stops.push(rest)
        if self._stops.stopped:
            return self._last(shown, "stop")
        shown += self._stops.finish()
        self._made += len(rest)
        return self._last(shown, token.finish, everything=True)

    def _piece(self, shown: str) -> Piece:
        text = self._blanks.push(shown) if self._blanks else shown
        self._out += len(shown)
        return Piece(text, *self._take(len(text) > 0))

    def _last(self, shown: str, finish: str | None, everything: bool = False) -> Piece:
        text = self._blanks.push(shown) if self._blanks else shown
        # Tokens that begin behind the text belong to the stop string.
        self._out = self._made + 1 if everything else self._out + len(shown)
        return Piece(text, *self._take(True), finish=finish)

    def _take(self, ready: bool) -> tuple[tuple[Token, ...], tuple[int, ...]]:
        taken = [item for item in self._pending if item[0] < self._out] if ready else []
        self._pending = self._pending[len(taken) :]
        return tuple(token for _, token in taken), tuple(start for start, _ in taken)
