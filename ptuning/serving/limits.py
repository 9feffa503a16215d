"""Fits prompts into the model's context: the oldest turns go first, and what is too long by itself is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.families.chatglm2.template import build_prompt
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.serving.faults import Fault

ANSWER_ROOM = 512  # tokens kept free for the answer when old turns are dropped


@dataclass(frozen=True)
class Prompt:
    """A prompt that fits.

    Args:
        ids: its tokens.
        max_new_tokens: of the answer.
        dropped: old turns that were left out.
    """

    ids: list[int]
    max_new_tokens: int
    dropped: int = 0


class Prompts:
    """Makes prompts for one base.

    Args:
        tokenizer: the base's.
        context: tokens of prompt and answer together that the model takes.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, context: int):
        self.tokenizer, self.context = tokenizer, context
        sp_model = tokenizer.sp_model
        # No text of more characters than this a token can fit, so that nobody makes the server encode a megabyte.
        self._widest = max(len(sp_model.id_to_piece(i)) for i in range(sp_model.get_piece_size()))

    def chat(
        self,
        query: str,
        history: Sequence[tuple[str, str]] = (),
        system: str = "",
        *,
        source_prefix: str = "",
        max_new_tokens: int | None = None,
        max_length: int | None = None,
    ) -> Prompt:
        """A dialogue in the template, with as many of its latest turns as fit.

        Args:
            query: the newest question.
            history: past (question, answer) turns, oldest first.
            system: text in front of everything.
            source_prefix: what the prefix was trained to see in front.
            max_new_tokens: None: as many as fit.
            max_length: of prompt and answer together; None: the context.

        Raises:
            Fault: the newest question alone doesn't fit.
        """
        limit, name = self._limit(max_length)
        # Dropping turns is worth it for a good answer's room, not for the most that a client may have asked for.
        room = min(max_new_tokens or ANSWER_ROOM, ANSWER_ROOM, limit // 2)

        def ids_without(turns: int) -> list[int] | None:
            return self._encode(source_prefix + build_prompt(query, history[turns:], system), limit)

        def fits(turns: int, room: int) -> bool:
            ids = ids_without(turns)
            return ids is not None and len(ids) + room <= limit

        low, high = 0, len(history)
        while low < high:  # the fewest turns to drop
            middle = (low + high) // 2
            if fits(middle, room):
                high = middle
            else:
                low = middle + 1
        return self._checked(ids_without(low), limit, name, max_new_tokens, low)

    def plain(self, text: str, max_new_tokens: int) -> Prompt:
        """Text as it is, without the template.

        Raises:
            Fault: it doesn't fit.
        """
        limit, name = self._limit(None)
        return self._checked(self._encode(text, limit), limit, name, max_new_tokens, 0)

    def _limit(self, max_length: int | None) -> tuple[int, str]:
        if max_length is not None and max_length < self.context:
            return max_length, "max_length"
        return self.context, "the model's context"

    def _encode(self, text: str, limit: int) -> list[int] | None:
        """None where the text is longer than any of `limit` tokens."""
        if len(text) > limit * self._widest:
            return None
        return self.tokenizer.prefix_ids() + self.tokenizer.encode_text(text)

    def _checked(
        self, ids: list[int] | None, limit: int, name: str, max_new_tokens: int | None, dropped: int
    ) -> Prompt:
        if ids is None or len(ids) >= limit:
            size = f"{len(ids)} tokens" if ids else f"more than {limit} tokens"
            fix = "raise it or shorten the text" if name == "max_length" else "shorten the text"
            raise Fault(
                400,
                f"the prompt has {size} without any history, and {name} is {limit}, prompt and answer together; {fix}",
                "context_length_exceeded",
                "messages" if name != "max_length" else "max_length",
            )
        left = limit - len(ids)
        return Prompt(ids, min(max_new_tokens or left, left), dropped)
