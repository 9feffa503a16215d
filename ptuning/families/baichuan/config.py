"""Baichuan's configuration: the official names in config.json on the outside, transformers' Llama configuration inside.

Source of the names and defaults: baichuan-inc/Baichuan-13B-Chat and Baichuan2-13B-Chat, `configuration_baichuan.py` and
`config.json`.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from transformers import LlamaConfig

from ptuning.errors import ModelError
from ptuning.families.baichuan.alibi import alibi_name
from ptuning.families.official import check_sizes
from ptuning.quantization import METHOD

SUPPORTED = "Baichuan-7B, Baichuan-13B-Base and -Chat, Baichuan2-7B and Baichuan2-13B-Base and -Chat"

_VOCABULARY_2 = 125_696  # Baichuan2's
_HIDDEN_7B = 4096
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "model_max_length",
)
_POSITIONS = ("alibi", "rope")
# Llama's, which no official file has
_NATIVE = (
    *("head_dim", "num_key_value_heads", "rope_parameters", "max_position_embeddings", "attention_bias", "mlp_bias"),
    *("attention_dropout", "pretraining_tp", "dtype"),
)


class BaichuanConfig(LlamaConfig):
    """Reads an official Baichuan `config.json` and writes one back.

    Which of the models it is, the file itself tells: the vocabulary of 125,696 (Baichuan2) has a normalised output layer, and the
    width of 4096 (the 7B models) has rotary positions, all others ALiBi. Other sizes say so by `norm_head` and
    `position_embedding` ("alibi" or "rope").

    Raises:
        ModelError: the file describes something that isn't supported.
    """

    model_type = "baichuan"
    attribute_map: ClassVar[dict[str, str]] = {"model_max_length": "max_position_embeddings"}

    # defaults of the official configuration class, where Llama's differ
    vocab_size: int = 64000
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    architectures: list[str] | None = None
    norm_head: bool | None = None
    position_embedding: Literal["alibi", "rope"] | None = None

    def __post_init__(self, **kwargs: Any):
        if self.position_embedding is not None:
            self.position_embedding = str(self.position_embedding).lower()  # type: ignore[assignment]
        if "model_max_length" in kwargs:
            self.max_position_embeddings = kwargs.pop("model_max_length")
        for official in (
            "gradient_checkpointing",
            "_from_model_config",
        ):  # the first is (False,) in some files, which is true
            kwargs.pop(official, None)
        if not self.architectures:
            self.architectures = ["BaichuanForCausalLM"]
        super().__post_init__(**kwargs)

    @property
    def has_norm_head(self) -> bool:
        """Whether the rows of the output layer are divided by their lengths."""
        return self.vocab_size == _VOCABULARY_2 if self.norm_head is None else self.norm_head

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotary, as Llama's; else ALiBi."""
        if self.position_embedding is None:
            return self.hidden_size == _HIDDEN_7B
        return self.position_embedding == "rope"

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        """By whichever name attention is chosen, here or in transformers, it has ALiBi where the model has."""
        if isinstance(value, dict):
            value = value.get("", getattr(self, "_attn_implementation_internal", None))
        self._attn_implementation_internal = value if value is None or self.is_rotary else alibi_name(value)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: official names, complete, so that no reader depends on its own defaults."""
        values = {key: value for key, value in super().to_diff_dict().items() if key not in _NATIVE}
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "rms_norm_eps")
        values |= {name: getattr(self, name) for name in (*_SIZES, *names, "tie_word_embeddings", "architectures")}
        values |= {
            "model_type": self.model_type,
            "torch_dtype": str(self.dtype or "float32").removeprefix("torch."),
            "use_cache": True,  # training turns it off for itself
        }
        if self.is_rotary:
            values["max_position_embeddings"] = self.max_position_embeddings  # what the official 7B code reads
        for name in ("norm_head", "position_embedding"):
            if getattr(self, name) is None:
                values.pop(name, None)
        return values


def check_architecture(values: Mapping[str, Any], where: str) -> None:
    """Refuses what config.json alone shows not to be supported.

    Args:
        values: of config.json.
        where: it was read, for the message.

    Raises:
        ModelError: with what was seen and what is supported.
    """
    check_sizes(values, _SIZES, where)
    heads, hidden = values.get("num_attention_heads", 1), values.get("hidden_size", 0)
    if hidden % heads:
        raise ModelError(
            f"{where}: hidden_size is {hidden} in config.json, and num_attention_heads, {heads}, must divide it; copy config.json "
            "again from the official model"
        )
    positions = values.get("position_embedding")
    if positions is not None and str(positions).lower() not in _POSITIONS:
        raise ModelError(
            f"{where}: position_embedding is {json.dumps(positions)} in config.json, expected one of {', '.join(_POSITIONS)}. "
            f"Supported: {SUPPORTED}."
        )
    quantized = values.get("quantization_config") or {}
    writer = quantized.get("quant_method") or "bitsandbytes"  # the official 4-bit folders name none
    if quantized and writer != METHOD:
        raise ModelError(
            f"{where}: the files are quantised by {writer}, which isn't read here; use the 16-bit model with --quantization nf4 "
            "(bitsandbytes' 4 bit), --quantization_bit 8 or --quantization_bit 4"
        )
