"""The Baichuan family: what config.json, files and attention of Baichuan-7B, -13B, Baichuan2-7B and -13B are like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ptuning.errors import ModelError
from ptuning.families.baichuan import alibi
from ptuning.families.baichuan.config import SUPPORTED, BaichuanConfig, check_architecture
from ptuning.families.baichuan.model import BaichuanForCausalLM, official_sources, register_weight_names
from ptuning.families.baichuan.template import BaichuanTemplate
from ptuning.families.baichuan.tokenizer import BaichuanTokenizer
from ptuning.families.family import Dimensions, Family
from ptuning.families.official import as_parent


class Baichuan(Family):
    name = "baichuan"
    model_type = BaichuanConfig.model_type
    template_name = BaichuanTemplate.name
    supported = SUPPORTED
    example = "baichuan-inc/Baichuan2-13B-Chat"
    port = 7010
    web_port = 7021
    tokenizer_files = ("tokenizer.model",)

    def check(self, values: Mapping[str, Any], folder: Path) -> None:
        check_architecture(values, str(folder))

    def register(self) -> None:
        alibi.register()
        self.register_classes(BaichuanConfig, BaichuanForCausalLM, BaichuanTokenizer)
        register_weight_names(BaichuanConfig.model_type)

    def template(self, tokenizer) -> BaichuanTemplate:
        return BaichuanTemplate(tokenizer)

    def weight_sources(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        return official_sources(names)

    def dimensions(self, config: BaichuanConfig) -> Dimensions:
        return replace(super().dimensions(config), output_copy=config.has_norm_head, score_bias=not config.is_rotary)

    def tensor_parallel_refusal(self, config: BaichuanConfig) -> str | None:
        return (
            super().tensor_parallel_refusal(config)
            if config.is_rotary
            else "ALiBi's slopes belong to all heads together"
        )

    def native_config(self, config: BaichuanConfig) -> LlamaConfig:
        """A rotary one is Llama, its output layer's rows divided by their lengths once and for all."""
        if not config.is_rotary:
            raise ModelError(
                "a Baichuan with ALiBi can't be written for vLLM: it has had no class for it since 0.24, and transformers has "
                "none; `ptuning serve` serves it"
            )
        return as_parent(config, LlamaConfig, "LlamaForCausalLM")

    def rotate_keys(self, keys: torch.Tensor, offset: int, config: BaichuanConfig) -> torch.Tensor:
        """With ALiBi keys don't say where they are."""
        if not config.is_rotary:
            return keys
        angle = offset * LlamaRotaryEmbedding(config).inv_freq.to(torch.float64)
        cos, sin = angle.cos(), angle.sin()
        first, second = keys.to(torch.float64).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(keys.dtype)
