"""Answers that must have a form: JSON, JSON of a schema, one of some texts. llguidance says which tokens may come next.

Chosen by measurement (docs/log.md): one wheel for all Pythons, nothing else installed with it, a schema is ready in
milliseconds because no table over the vocabulary is made for it.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ptuning.families import Template
from ptuning.packages import missing
from ptuning.serving.errors import ApiError

MOST_CHOICES = 256
# One form of blanks: a model that may choose them can go on with blanks for ever.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes grammars over one base's tokens. The first one reads the vocabulary.

    Args:
        template: the base's.
    """

    def __init__(self, template: Template):
        self.template = template

    def json_object(self) -> "Grammar":
        """Any JSON object."""
        return self.json_schema({"type": "object"}, "response_format")

    def json_schema(self, schema: Any, field: str) -> "Grammar":
        """JSON of a schema.

        Raises:
            ApiError: the schema can't be followed.
        """
        compiler = _llguidance(field).LLMatcher
        try:
            text = compiler.grammar_from_json_schema(json.dumps(schema), defaults=_COMPACT)
        except ValueError as error:
            raise _refused(field, str(error)) from None
        return self._grammar(text, field)

    def choice(self, texts: Sequence[str], field: str) -> "Grammar":
        """One of the texts."""
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._grammar(_llguidance(field).LLMatcher.grammar_from_lark(f"start: {alternatives}"), field)

    def _grammar(self, text: str, field: str) -> "Grammar":
        made = _llguidance(field).LLMatcher(self._tokenizer, text, log_level=0)
        if made.is_error():
            raise _refused(field, made.get_error())
        return Grammar(made)

    @cached_property
    def _tokenizer(self) -> Any:
        library = _llguidance("response_format")
        return library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(self.template)))


class Grammar:
    """A Constraint of ptuning.generation. Each answer has a matcher of its own."""

    def __init__(self, start: Any):
        self._start = start

    def matcher(self) -> "GrammarMatcher":
        return GrammarMatcher(self._start.deep_copy())


class GrammarMatcher:
    """Follows one answer."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._shifts = torch.arange(32, dtype=torch.int32)

    def restrict(self, logits_V: torch.Tensor) -> None:
        """Sets what may not come next to -inf."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        allowed = ((bits[:, None] >> self._shifts) & 1).bool().flatten()[: len(logits_V)]
        rest = torch.zeros(len(logits_V) - len(allowed), dtype=torch.bool)  # logits that no token has
        logits_V.masked_fill_(~torch.cat([allowed, rest]).to(logits_V.device), float("-inf"))

    def chose(self, token: int) -> None:
        """Goes on by a token; after an error only the end may come."""
        self._matcher.consume_token(token)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, template: Template):
        tokenizer = template.tokenizer
        self.eos_token_id, self.bos_token_id = template.end_id, None
        control = {
            *tokenizer.all_special_ids,
            *template.begin_ids,
            *template.stop_ids,
            *tokenizer.get_added_vocab().values(),
        }
        self.tokens = [template.token_bytes(token) for token in range(len(tokenizer))]
        self.special_token_ids = sorted(token for token in control if token < len(self.tokens))
        self._ids: dict[bytes, int] = {}
        for token, raw in enumerate(self.tokens):
            if token not in control:
                self._ids.setdefault(raw, token)
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text that must come, each time the longest token that fits: the tokenizer itself would begin with a blank."""
        raw, ids = text.encode() if isinstance(text, str) else text, []
        while raw:
            size = next((n for n in range(min(self._longest, len(raw)), 0, -1) if raw[:n] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[raw[:size]])
            raw = raw[size:]
        return ids


def _llguidance(field: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            400, str(missing(field, "llguidance", "ptuning[serve]", "leave the field out")), param=field
        ) from None
    return llguidance


def _refused(field: str, reason: str) -> ApiError:
    reason = reason.partition("<state>")[0].strip()
    return ApiError(400, f"{field}: can't be followed: {reason[:300]}", param=field)
