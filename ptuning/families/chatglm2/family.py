"""The ChatGLM2 family: what config.json, files and attention of chatglm2-6b, -32k and codegeex2-6b are like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig, PreTrainedTokenizerBase
from transformers.models.glm.modeling_glm import (
    GlmDecoderLayer,
    GlmMLP,
    GlmRMSNorm,
    GlmRotaryEmbedding,
    eager_attention_forward,
)

from ptuning.families.chatglm2.config import SUPPORTED, ChatGLMConfig, check_architecture
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration, official_sources, register_weight_names
from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.families.chatglm2.versions import version_of
from ptuning.families.family import Family
from ptuning.families.official import as_parent
from ptuning.families.template import Template

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


class ChatGLM2(Family):
    name = "chatglm2"
    model_type = ChatGLMConfig.model_type
    template_name = ChatGLM2Template.name
    supported = SUPPORTED
    example = "THUDM/chatglm2-6b"
    vocabulary_key = "padded_vocab_size"
    prefix_in_official_code = True
    tokenizer_files = ("tokenizer.model",)
    embedding = "transformer.embedding.word_embeddings.weight"
    output = "transformer.output_layer.weight"
    layer_prefix = "transformer.encoder.layers."
    layer_bias = ".self_attention.query_key_value.bias"
    eager_attention = staticmethod(eager_attention_forward)
    norm, feed_forward, pre_norm_layer = GlmRMSNorm, GlmMLP, GlmDecoderLayer

    # What a relative with the same network and files has of its own
    config_class: type[ChatGLMConfig] = ChatGLMConfig
    model_class: type[ChatGLMForConditionalGeneration] = ChatGLMForConditionalGeneration
    tokenizer_class: type[PreTrainedTokenizerBase] = ChatGLMTokenizer
    template_class: type[Template] = ChatGLM2Template

    def claims(self, values: Mapping[str, Any], folder: Path | None = None) -> bool:
        if values.get("model_type") != ChatGLMConfig.model_type:
            return super().claims(values)
        return version_of(values, folder) == self.config_class.version

    def check(self, values: Mapping[str, Any], folder: Path) -> None:
        check_architecture(values, str(folder), self.supported)

    def register(self) -> None:
        self.register_classes(self.config_class, self.model_class, self.tokenizer_class)
        register_weight_names(self.model_type)

    def template(self, tokenizer) -> Template:
        return self.template_class(tokenizer)

    def weight_sources(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        return official_sources(names)

    def quantized_bits(self, values: Mapping[str, Any]) -> int | None:
        return values.get("quantization_bit") or None  # official 16-bit files say 0

    def native_config(self, config: ChatGLMConfig) -> GlmConfig:
        return as_parent(config, GlmConfig, "GlmForCausalLM")

    def vllm_refusal(self, config: ChatGLMConfig) -> str | None:
        # Measured with vllm 0.32.0: 0 of 20 and 1 of 4 answers right.
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            return (
                f"vLLM's class for the official format ignores kv_channels ({config.head_dim} for {config.num_attention_heads} "
                f"heads of hidden_size {config.hidden_size})"
            )
        if config.rope_parameters["rope_type"] != "default":
            return f"vLLM's class for the official format takes rope_ratio ({config.rope_ratio}) for another scaling"
        return None

    def extra_tensors(self, config: ChatGLMConfig) -> dict[str, torch.Tensor]:
        """Official checkpoints hold (D/4,) inverse frequencies of a head dimension D, before any rope_ratio."""
        half = config.head_dim // 2
        return {INV_FREQ: 1.0 / (10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))}

    def rotate_keys(self, keys: torch.Tensor, offset: int, config: ChatGLMConfig) -> torch.Tensor:
        return rotate_interleaved(keys, offset, GlmRotaryEmbedding(config).inv_freq)


def rotate_interleaved(keys: torch.Tensor, offset: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotates keys as if they stood at position `offset`: interleaved rotary on the first half of the head.

    Args:
        keys: raw keys, (..., D).
        offset: position to rotate by, may be negative.
        inv_freq: the model's inverse frequencies, (D/4,).
    """
    angle = offset * inv_freq.to(torch.float64)
    cos, sin = angle.cos(), angle.sin()
    rotary_dim = 2 * inv_freq.numel()
    x = keys[..., :rotary_dim].to(torch.float64)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(keys.dtype), keys[..., rotary_dim:]), dim=-1)
