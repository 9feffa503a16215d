"""The configuration of a GLM-4 in its original format: ChatGLM2's keys with other numbers.

Source: THUDM/glm-4-9b-chat `config.json`, and `modeling_chatglm.py` of `rope_ratio`.
"""

from typing import Any, ClassVar

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.versions import Version
from ptuning.families.chatglm3.config import ChatGLM3Config

SUPPORTED = "glm-4-9b, glm-4-9b-chat and glm-4-9b-chat-1m"


class ChatGLM4Config(ChatGLMConfig):
    """Reads the `config.json` of a GLM-4's original format and writes one back. `rope_ratio` multiplies the rotary base."""

    model_type = "chatglm4"  # in memory alone: the files say chatglm
    version: ClassVar[Version] = "chatglm4"
    supported: ClassVar[str] = SUPPORTED
    official_name: ClassVar[str | None] = "THUDM/glm-4-9b-chat"

    vocab_size: int = 151_552
    num_hidden_layers: int = 40
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1.5625e-07
    pad_token_id: int | None = 151_329
    eos_token_id: int | list[int] | None = None  # becomes the parent's: the end, and the tokens of user and observation

    @staticmethod
    def rope_of_ratio(ratio: float) -> dict[str, Any]:
        return ChatGLM3Config.rope_of_ratio(ratio)
