"""All that knows ChatGLM2: configuration, weight names, tokenizer, prefix, attention."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ptuning.chatglm import attention, weights
from ptuning.chatglm.config import ChatGLMConfig
from ptuning.chatglm.modeling import ChatGLMForConditionalGeneration
from ptuning.chatglm.tokenizer import ChatGLMTokenizer


def register() -> None:
    """Makes transformers' Auto classes read official ChatGLM2 directories without remote code."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    weights.register(ChatGLMConfig.model_type)
    attention.register()
