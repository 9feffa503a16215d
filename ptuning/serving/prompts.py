"""Fits prompts into the model's context: the oldest turns go first, and what is too long by itself is refused."""

from dataclasses import dataclass, replace

from ptuning.data.fit import FitPolicy, PromptTooLong, fit
from ptuning.families import Dialogue, Template
from ptuning.serving.errors import ApiError

ANSWER_ROOM = 512  # tokens kept free for the answer when old turns are dropped


@dataclass(frozen=True)
class Prompt:
    """A prompt that fits.

    Args:
        ids: its tokens.
        max_new_tokens: of the answer.
        dropped: old turns that were left out.
        stops: texts that end the answer and aren't part of it.
    """

    ids: list[int]
    max_new_tokens: int
    dropped: int = 0
    stops: tuple[str, ...] = ()


class PromptBuilder:
    """Makes prompts for one base.

    Args:
        template: the base's.
        context: tokens of prompt and answer together that the model takes.
    """

    def __init__(self, template: Template, context: int):
        self.template, self.context = template, context
        self._longest_token = template.longest_token

    def chat(self, dialogue: Dialogue, *, max_new_tokens: int | None = None, max_length: int | None = None) -> Prompt:
        """A dialogue in the template, with as many of its latest turns as fit.

        Args:
            dialogue: without a response.
            max_new_tokens: None: as many as fit.
            max_length: of prompt and answer together; None: the context.

        Raises:
            ApiError: the newest question alone doesn't fit.
        """
        limit, name = self._limit(max_length)
        # Dropping turns is worth it for a good answer's room, not for the most that a client may have asked for.
        room = min(max_new_tokens or ANSWER_ROOM, ANSWER_ROOM, limit // 2)
        try:
            fitted = fit(self.template, dialogue, limit, FitPolicy(room=room))
        except PromptTooLong as error:
            raise self._too_long(error.tokens, limit, name) from None
        kept = replace(dialogue, history=dialogue.history[fitted.dropped_turns :])
        room = self._room(fitted.ids, limit, max_new_tokens)
        return Prompt(fitted.ids, room, fitted.dropped_turns, self.template.stop_texts(kept))

    def plain(self, text: str, max_new_tokens: int) -> Prompt:
        """Text as it is, without the template.

        Raises:
            ApiError: it doesn't fit.
        """
        limit, name = self._limit(None)
        # A text that can't fit isn't encoded, so that a client can't make the server encode a megabyte.
        if len(text) > limit * self._longest_token:
            raise self._too_long(None, limit, name)
        ids = [*self.template.begin_ids, *self.template.encode_text([text])[0]]
        if not ids:
            raise ApiError(
                400, "the prompt is empty, and this model's texts begin with no token of their own", param="prompt"
            )
        if len(ids) >= limit:
            raise self._too_long(len(ids), limit, name)
        return Prompt(ids, self._room(ids, limit, max_new_tokens))

    def _limit(self, max_length: int | None) -> tuple[int, str]:
        if max_length is not None and max_length < self.context:
            return max_length, "max_length"
        return self.context, "the model's context"

    @staticmethod
    def _room(ids: list[int], limit: int, max_new_tokens: int | None) -> int:
        left = limit - len(ids)
        return min(max_new_tokens or left, left)

    @staticmethod
    def _too_long(tokens: int | None, limit: int, name: str) -> ApiError:
        size = f"more than {limit}" if tokens is None else str(tokens)
        fix = "raise it or shorten the text" if name == "max_length" else "shorten the text"
        return ApiError(
            400,
            f"the prompt has {size} tokens without any history, and {name} is {limit}, prompt and answer together; {fix}",
            "context_length_exceeded",
            "messages" if name != "max_length" else "max_length",
        )
