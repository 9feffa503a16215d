"""The family of a GLM-4's original format: ChatGLM2's network and names in files, GLM-4's template, a tiktoken vocabulary."""

from __future__ import annotations

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.family import ChatGLM2
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm4.config import SUPPORTED, ChatGLM4Config
from ptuning.families.chatglm4.tokenizer import ChatGLM4Tokenizer
from ptuning.families.glm4.template import GLM4Template


class ChatGLM4ForConditionalGeneration(ChatGLMForConditionalGeneration):
    """ChatGLM2's network; the rotary base is in the configuration."""

    config_class = ChatGLM4Config


class ChatGLM4(ChatGLM2):
    name = "chatglm4"
    model_type = ChatGLM4Config.model_type
    written_type = ChatGLMConfig.model_type
    config_class = ChatGLM4Config
    model_class = ChatGLM4ForConditionalGeneration
    tokenizer_class = ChatGLM4Tokenizer
    template_class = GLM4Template
    template_name = GLM4Template.name
    supported = SUPPORTED
    example = "THUDM/glm-4-9b-chat"
    prefix_in_official_code = False
