"""ChatGLM2's configuration: the official names in config.json on the outside, transformers' GLM configuration inside.

Source of the names and defaults: THUDM/chatglm2-6b `configuration_chatglm.py` and `config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from transformers import GlmConfig
from transformers.utils import logging

from ptuning.errors import ModelError
from ptuning.families.chatglm2.versions import Version, version_of
from ptuning.families.official import check_sizes
from ptuning.quantization import METHOD, precision_in

logger = logging.get_logger(__name__)

SUPPORTED = "chatglm2-6b, chatglm2-6b-32k and codegeex2-6b (and checkpoints of the same architecture)"

# official name -> name in transformers' GlmConfig
OFFICIAL_NAMES = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
}

# What the official configuration says when config.json doesn't; written back so that the official code, and vLLM,
# read what this package read.
OFFICIAL_CONSTANTS = {
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}

# Only half of each head is rotated; theta is fixed in the official code.
ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}

# A different value of these means a network that GlmForCausalLM does not compute.
_REFUSED = {
    "rmsnorm": (True, "LayerNorm instead of RMSNorm"),
    "apply_residual_connection_post_layernorm": (False, "post-layernorm residual connections"),
    "add_bias_linear": (False, "biases in the dense layers"),
    "post_layer_norm": (True, "no final layer norm"),
    "original_rope": (True, "a rotary embedding that is not the original interleaved one"),
}

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "multi_query_group_num", "kv_channels"),
    *("padded_vocab_size", "seq_length"),
)


class ChatGLMConfig(GlmConfig):
    """Reads an official ChatGLM2 `config.json` and writes one back.

    Inside, the attributes have transformers' names (`num_hidden_layers`, `vocab_size`, …), the official names are aliases of
    them (`config.num_layers`), and `save_pretrained` writes the official names. `rope_ratio` (chatglm2-6b-32k) means
    positional interpolation: positions are divided by it, which transformers calls linear scaling.

    Read from a folder it becomes the configuration of the model that is there: a subclass for another one with the same keys.

    Raises:
        ModelError: the file describes another architecture (ChatGLM-6B v1, LayerNorm, …).
    """

    model_type = "chatglm"
    version: ClassVar[Version] = "chatglm2"
    supported: ClassVar[str] = SUPPORTED
    official_name: ClassVar[str | None] = (
        None  # written as _name_or_path where nothing else in config.json names the model
    )
    attribute_map: ClassVar[dict[str, str]] = dict(OFFICIAL_NAMES)

    # defaults of the official configuration class, where GLM-4's (the parent's) differ
    vocab_size: int = 65024
    num_hidden_layers: int = 28
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    rope_ratio: float | int = 1

    def __post_init__(self, **kwargs):
        # `_name_or_path` is written in the file, `name_or_path` is what transformers was asked for.
        check_architecture(kwargs, kwargs.get("name_or_path") or "config.json", self.supported)
        # The base class would set these aliases too, but only after it has used the values.
        for official, native in OFFICIAL_NAMES.items():
            if official in kwargs:
                setattr(self, native, kwargs.pop(official))
        if not kwargs.pop("multi_query_attention", True):
            self.num_key_value_heads = self.num_attention_heads
        for official in (*OFFICIAL_CONSTANTS, "model_type"):  # the last is the class's, whatever the file says
            kwargs.pop(official, None)
        if bits := kwargs.pop("quantization_bit", 0):
            kwargs["quantization_config"] = {"quant_method": METHOD, "bits": bits}
        self.architectures = self.architectures or ["ChatGLMModel"]
        if kwargs.get("rope_parameters") is None and self.rope_parameters is None:
            self.rope_parameters = self.rope_of_ratio(self.rope_ratio)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # with return_unused_kwargs a pair
        """The configuration of the model that the values, and the files beside them, are of."""
        if cls is ChatGLMConfig:
            folder = kwargs.get("name_or_path") or config_dict.get("name_or_path")
            version = version_of(config_dict, Path(folder) if folder else None)
            found = next(each for each in (cls, *cls.__subclasses__()) if each.version == version)
            if found is not cls:
                return found.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @staticmethod
    def rope_of_ratio(ratio: float) -> dict[str, Any]:
        """transformers' `rope_parameters` of a `rope_ratio`."""
        return (
            {"rope_type": "default", **ROPE} if ratio == 1 else {"rope_type": "linear", "factor": float(ratio), **ROPE}
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: official names, complete, so that no reader depends on its own defaults."""
        inherited = GlmConfig().to_dict()
        values = {key: value for key, value in super().to_diff_dict().items() if key not in inherited}
        values.pop("rope_ratio", None)
        values |= OFFICIAL_CONSTANTS
        values |= {official: getattr(self, native) for official, native in OFFICIAL_NAMES.items()}
        values |= {
            "model_type": ChatGLMConfig.model_type,
            "architectures": [
                "ChatGLMModel"
            ],  # save_pretrained puts the class's name; the official files have this one
            "attention_dropout": self.attention_dropout,
            "eos_token_id": self.eos_token_id,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": str(self.dtype or "float32").removeprefix("torch."),
            "use_cache": True,  # training turns it off for itself; left off, the official code generates in quadratic time
        }
        if self.rope_ratio != 1:
            values["rope_ratio"] = self.rope_ratio
        if self.official_name is not None:
            values["_name_or_path"] = self.official_name
        if (precision := precision_in(self)) is not None and precision.bits is not None:
            del values["quantization_config"]
            values["quantization_bit"] = precision.bits
        return values


def check_architecture(values: Mapping[str, Any], where: str, supported: str = SUPPORTED) -> None:
    """Refuses what config.json alone shows to be another architecture.

    Args:
        values: of config.json.
        where: it was read, for the message.
        supported: models of the family, for the message.

    Raises:
        ModelError: with what was seen and what is supported.
    """

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"{where}: {what}. Supported: {supported}.")

    if "position_encoding_2d" in values or "inner_hidden_size" in values:
        refuse("this is ChatGLM-6B (v1), another architecture (2-D positions, prefix attention)")
    if "vision_config" in values:
        refuse("this is a model for images (vision_config, as in GLM-4V's), of which only the text would be read")
    check_sizes(values, _SIZES, where)
    heads, groups = values.get("num_attention_heads"), values.get("multi_query_group_num")
    if values.get("multi_query_attention", True) and heads and groups and heads % groups:
        raise ModelError(
            f"{where}: num_attention_heads is {heads} in config.json, and multi_query_group_num, {groups}, must divide it; "
            "copy config.json again from the official model"
        )
    for key, (expected, meaning) in _REFUSED.items():
        if values.get(key, expected) != expected:
            refuse(f"{key}={values[key]} means {meaning}, which is not supported (expected {expected})")
