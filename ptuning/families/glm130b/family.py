"""The GLM-130B family: what its folders, files and attention are like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptuning.families.division import Division, How
from ptuning.families.family import Dimensions, Family
from ptuning.families.glm130b.config import SUPPORTED, GLM130BConfig, check_architecture
from ptuning.families.glm130b.model import GLM130BForCausalLM, eager_attention, rotary
from ptuning.families.glm130b.template import GLM130BTemplate
from ptuning.families.glm130b.tokenizer import FILE, GLM130BTokenizer

# Last parts of names; what isn't here, the embedding and query_key_value, is divided by rows.
_DIVIDED: dict[str, How] = {
    "layernorm.weight": "copied",
    "layernorm.bias": "copied",
    "attention.dense.weight": "columns",
    "attention.dense.bias": "copied",
    "dense_h_to_4h.weight": "halves",
    "dense_h_to_4h.bias": "halves",
    "dense_4h_to_h.weight": "columns",
    "dense_4h_to_h.bias": "copied",
    "inv_freq": "left out",
}


def _how(name: str) -> How:
    """Source: THUDM/GLM-130B `tools/convert_tp.py`."""
    return next((how for end, how in _DIVIDED.items() if name.endswith(end)), "rows")


class GLM130B(Family):
    name = "glm130b"
    model_type = GLM130BConfig.model_type
    template_name = GLM130BTemplate.name
    supported = SUPPORTED
    tokenizer_files = (FILE,)
    division = Division(_how)
    embedding = output = "transformer.word_embeddings.weight"
    layer_prefix = "transformer.layers."
    layer_bias = ".attention.query_key_value.bias"
    eager_attention = staticmethod(eager_attention)
    norm = None
    engine_refusal = (
        "GLM-130B's context is read both ways, so that it can't be computed in pieces beside other rows; it has no dialogues "
        "either: `ptuning fill` writes on and fills blanks"
    )

    def check(self, values: Mapping[str, Any], folder: Path) -> None:
        check_architecture(values, str(folder))

    def register(self) -> None:
        self.register_classes(GLM130BConfig, GLM130BForCausalLM, GLM130BTokenizer)

    def template(self, tokenizer) -> GLM130BTemplate:
        return GLM130BTemplate(tokenizer)

    def sequence_parallel_refusal(self, config: GLM130BConfig) -> str | None:
        return "GLM-130B finds positions and what is read both ways in whole rows"

    def dimensions(self, config: GLM130BConfig) -> Dimensions:
        heads = config.num_attention_heads
        return Dimensions(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            groups=heads,
            head_dim=config.head_dim,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
        )

    def rotate_keys(self, keys: torch.Tensor, offset: int, config: GLM130BConfig) -> torch.Tensor:
        cos, sin = rotary(torch.tensor([[offset]]), config.head_dim, torch.float32)
        first, second = keys.float().chunk(2, -1)
        return (keys.float() * cos[0, 0] + torch.cat((-second, first), -1) * sin[0, 0]).to(keys.dtype)
