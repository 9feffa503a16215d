"""ChatGLM3's chat template, by ids, each piece tokenised by itself.

Source: THUDM/chatglm3-6b `tokenization_chatglm.py`, `build_single_message` and `build_chat_input`; of calls, THUDM/ChatGLM3
`finetune_demo/preprocess_utils.py`.
"""

import ast
import json
from collections.abc import Mapping
from functools import cached_property

from ptuning.families.pieces import PieceTemplate
from ptuning.families.roles import RoleTemplate


class ChatGLM3Template(RoleTemplate, PieceTemplate):
    """`<|role|>` and two encodings, of the metadata's line and of the text, for each message; then `<|assistant|>`."""

    name = "chatglm3"
    route = "/chatglm"
    trained_length = 8192

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.prefix_ids())

    def control_id(self, token: str) -> int:
        return self.tokenizer.control_ids[token]

    def call_text(self, arguments: str) -> str:
        """A line of Python, as ChatGLM3 was trained to write."""
        try:
            values = json.loads(arguments)
        except ValueError:
            return arguments
        if not isinstance(values, Mapping):
            return arguments
        keywords = [ast.keyword(name, ast.Constant(value)) for name, value in values.items()]
        return f"```python\n{ast.unparse(ast.Call(ast.Name('tool_call'), [], keywords))}\n```"
