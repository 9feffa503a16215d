"""GLM-4's chat template by ids: what the tokenizer's own `apply_chat_template` gives, with text that never becomes a control token.

Source: THUDM/glm-4-9b-chat-hf `tokenizer_config.json`.
"""

from functools import cached_property
from typing import ClassVar

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ptuning.families.roles import RoleTemplate
from ptuning.families.turns import Offer

_BEGIN = ("[gMASK]", "<sop>")


class GLM4Template(RoleTemplate):
    """`<|role|>` and, tokenised at once, the metadata's line and the text, for each message; then `<|assistant|>`."""

    name = "glm4"
    trained_length = 131_072
    head_apart: ClassVar[bool] = False

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        return tuple(self.control_id(token) for token in _BEGIN)

    def control_id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def call_text(self, arguments: str) -> str:
        """JSON as it is."""
        return arguments

    def offers(self, offer: Offer) -> list[str]:
        """In the words of the tokenizer's own template, which each release has its own of."""
        if not self.tokenizer.chat_template:
            return [str(offer)]
        tools = [{"type": "function", "function": dict(tool)} for tool in offer.tools]
        text = self.tokenizer.apply_chat_template([{"role": "system", "content": "", "tools": tools}], tokenize=False)
        return [text.removeprefix("".join(_BEGIN)).removeprefix("<|system|>\n"), offer.said]

    def token_bytes(self, token: int) -> bytes:
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self.tokenizer.all_special_ids:
            return (name or "").encode()
        return bytes(self._bytes[letter] for letter in name)

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """The letter that stands for each byte in the vocabulary → that byte."""
        return {letter: byte for byte, letter in bytes_to_unicode().items()}
