"""ChatGLM3's tokenizer: ChatGLM2's with a token for each role.

Source: THUDM/chatglm3-6b `tokenization_chatglm.py`. The difference: text never turns into a control token, whatever it spells.
"""

from typing import Any, ClassVar

from ptuning.families.chatglm2.tokenizer import CONTROL_TOKENS, ChatGLMTokenizer
from ptuning.families.chatglm2.versions import Version
from ptuning.families.chatglm3.template import ChatGLM3Template
from ptuning.families.roles import ROLES
from ptuning.families.template import Dialogue


class ChatGLM3Tokenizer(ChatGLMTokenizer):
    """As ChatGLM2's; ids of `<|system|>`, `<|user|>`, `<|assistant|>` and `<|observation|>` follow the other control tokens'.

    Args:
        vocab_file: path of `tokenizer.model`.
    """

    version: ClassVar[Version] = "chatglm3"
    control_tokens: ClassVar[tuple[str, ...]] = (*CONTROL_TOKENS, *(f"<|{role}|>" for role in ROLES))
    saved_config: ClassVar[dict[str, Any]] = {
        "name_or_path": "THUDM/chatglm3-6b",  # a folder without it would be ChatGLM2's
        **ChatGLMTokenizer.saved_config,
    }

    def template(self) -> ChatGLM3Template:
        return ChatGLM3Template(self)

    def prompt_text(self, dialogue: Dialogue) -> str:
        """With the names of the roles' tokens, without the two that every sequence begins with."""
        names = {token: name for name, token in self.control_ids.items()}
        return self.spelled(dialogue, names | dict.fromkeys(self.prefix_ids(), ""))
