"""Answers in OpenAI's format: whole objects, stream events, log probabilities."""

import json
from collections.abc import Sequence
from typing import Any

from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.generation import Token
from ptuning.serving.backend import Served
from ptuning.serving.detokenize import Piece

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def model_object(served: Served) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "ptuning",
        "kind": "base" if served.is_base else "prefix",
        "pre_seq_len": served.pre_seq_len,
    }


class TokenTexts:
    """Names tokens in log probabilities."""

    def __init__(self, tokenizer: ChatGLMTokenizer):
        self.sp_model, self.control = tokenizer.sp_model, {i: text for text, i in tokenizer.control_ids.items()}

    def bytes(self, token: int) -> bytes:
        """Of a piece, of one byte where the piece is one, of a control token's name."""
        if token >= self.sp_model.get_piece_size():
            return self.control.get(token, "<unk>").encode()
        piece = self.sp_model.id_to_piece(token)
        if self.sp_model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The `logprobs` of a chat choice."""
        content = [
            self._entry(token.token, token.logprob) | {"top_logprobs": [self._entry(*top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def plain(self, piece: Piece) -> dict[str, Any]:
        """The `logprobs` of a completion's choice."""
        return {
            "tokens": [self.text(token.token) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": [{self.text(t): value for t, value in token.top} for token in piece.tokens],
            "text_offset": list(piece.starts),
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes(token)
        # JSON has no infinity, and -9999 is what OpenAI sends for it.
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
