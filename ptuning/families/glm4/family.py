"""The GLM-4 family in transformers' own format (`model_type` glm): glm-4-9b-hf and glm-4-9b-chat-hf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GlmConfig
from transformers.models.glm.modeling_glm import (
    GlmDecoderLayer,
    GlmMLP,
    GlmRMSNorm,
    GlmRotaryEmbedding,
    eager_attention_forward,
)

from ptuning.families.chatglm2.family import rotate_interleaved
from ptuning.families.family import Family
from ptuning.families.glm4.template import GLM4Template
from ptuning.families.official import check_sizes

SUPPORTED = "glm-4-9b-hf and glm-4-9b-chat-hf"

_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
    *("vocab_size", "head_dim", "max_position_embeddings"),
)


class GLM4(Family):
    name = "glm4"
    model_type = GlmConfig.model_type
    template_name = GLM4Template.name
    supported = SUPPORTED
    example = "THUDM/glm-4-9b-chat-hf"
    tokenizer_files = ("tokenizer.json",)
    eager_attention = staticmethod(eager_attention_forward)
    norm, feed_forward, pre_norm_layer = GlmRMSNorm, GlmMLP, GlmDecoderLayer

    def check(self, values: Mapping[str, Any], folder: Path) -> None:
        check_sizes(values, _SIZES, folder)

    def register(self) -> None:
        """Nothing: transformers knows all of it."""

    def template(self, tokenizer) -> GLM4Template:
        return GLM4Template(tokenizer)

    def rotate_keys(self, keys: torch.Tensor, offset: int, config: GlmConfig) -> torch.Tensor:
        return rotate_interleaved(keys, offset, GlmRotaryEmbedding(config).inv_freq)
