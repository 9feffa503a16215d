"""The ChatGLM3 family: ChatGLM2's network and files with another template and another meaning of `rope_ratio`."""

from __future__ import annotations

from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.families.chatglm2.family import ChatGLM2
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm3.config import SUPPORTED, ChatGLM3Config
from ptuning.families.chatglm3.template import ChatGLM3Template
from ptuning.families.chatglm3.tokenizer import ChatGLM3Tokenizer


class ChatGLM3ForConditionalGeneration(ChatGLMForConditionalGeneration):
    """ChatGLM2's network; the rotary base is in the configuration."""

    config_class = ChatGLM3Config


class ChatGLM3(ChatGLM2):
    name = "chatglm3"
    model_type = ChatGLM3Config.model_type
    written_type = ChatGLMConfig.model_type
    config_class = ChatGLM3Config
    model_class = ChatGLM3ForConditionalGeneration
    tokenizer_class = ChatGLM3Tokenizer
    template_class = ChatGLM3Template
    template_name = ChatGLM3Template.name
    supported = SUPPORTED
    example = "THUDM/chatglm3-6b"
