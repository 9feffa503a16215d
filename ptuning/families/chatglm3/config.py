"""ChatGLM3's configuration: ChatGLM2's keys, of which `rope_ratio` means something else.

Source: THUDM/chatglm3-6b and chatglm3-6b-32k `config.json`, and `modeling_chatglm.py` of the latter.
"""

from typing import Any, ClassVar

from ptuning.families.chatglm2.config import ROPE, ChatGLMConfig
from ptuning.families.chatglm2.versions import Version

SUPPORTED = "chatglm3-6b, chatglm3-6b-base and chatglm3-6b-32k"


class ChatGLM3Config(ChatGLMConfig):
    """Reads an official ChatGLM3 `config.json` and writes one back. `rope_ratio` (chatglm3-6b-32k) multiplies the rotary base."""

    model_type = "chatglm3"  # in memory alone: the files say chatglm
    version: ClassVar[Version] = "chatglm3"
    supported: ClassVar[str] = SUPPORTED
    official_name: ClassVar[str | None] = "THUDM/chatglm3-6b"

    max_position_embeddings: int = 8192

    @staticmethod
    def rope_of_ratio(ratio: float) -> dict[str, Any]:
        return {"rope_type": "default", **ROPE, "rope_theta": ROPE["rope_theta"] * ratio}
