"""GLM-130B's configuration: the names of the official command line on the outside, transformers' own inside.

Source of names and numbers: THUDM/GLM-130B `configs/model_glm_130b.sh`; of the tokens' ids: SwissArmyTransformer 0.2.12,
`tokenization/icetk_glm_130B`. The official checkpoint has no config.json; `ptuning merge-shards` writes one.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ptuning.errors import ModelError
from ptuning.families.official import check_sizes

SUPPORTED = "GLM-130B (a folder that `ptuning merge-shards` has written)"

# official name -> transformers' name
OFFICIAL_NAMES = {
    "num_layers": "num_hidden_layers",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "layer_norm_eps",
}
SIZES = (
    *("num_layers", "hidden_size", "inner_hidden_size", "num_attention_heads", "vocab_size"),
    "max_sequence_length",
)

MASK, SHORT_MASK, LONG_MASK = "[MASK]", "[sMASK]", "[gMASK]"
TOKENS = {
    MASK: 150000,
    LONG_MASK: 150001,
    SHORT_MASK: 150002,
    "sop": 150004,  # an answer begins behind it
    "eop": 150005,  # and ends with it, or with eos
    "eos": 20002,  # behind a context whose end isn't a blank
}
_NEEDED = (MASK, LONG_MASK, "sop", "eos")
_IGNORED = ("model_parallel_size", "_from_model_config")  # how a checkpoint was divided says nothing of the whole one


class GLM130BConfig(PreTrainedConfig):
    """Reads the numbers of a GLM-130B network.

    `tokens` maps the tokens that positions and mask are found by, and those that end an answer, to their ids: [MASK], [gMASK],
    sop and eos, and where the vocabulary has them [sMASK] and eop.

    Raises:
        ModelError: numbers or tokens that can't be those of such a network.
    """

    model_type = "glm130b"
    attribute_map: ClassVar[dict[str, str]] = dict(OFFICIAL_NAMES)
    # Heads stay whole: each has its queries, keys and values beside each other. transformers' style for two stacked halves divides
    # the weights by halves and the biases by rows, so GEGLU's are gathered and split again.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 150528
    hidden_size: int = 12288
    intermediate_size: int = 32768
    num_hidden_layers: int = 70
    num_attention_heads: int = 96
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    architectures: list[str] | None = None
    tokens: dict[str, int] | None = None

    def __post_init__(self, **kwargs: Any):
        for official, native in OFFICIAL_NAMES.items():
            if official in kwargs:
                setattr(self, native, kwargs.pop(official))
        for name in _IGNORED:
            kwargs.pop(name, None)
        self.tokens = dict(self.token_ids)
        sizes = {name: getattr(self, OFFICIAL_NAMES.get(name, name)) for name in SIZES}
        check_architecture(sizes | {"tokens": self.tokens}, kwargs.get("name_or_path") or "config.json")
        if not self.architectures:
            self.architectures = ["GLM130BForCausalLM"]
        if self.eos_token_id is None:
            self.eos_token_id = [self.token_ids[name] for name in ("eop", "eos") if name in self.token_ids]
        if self.pad_token_id is None:
            self.pad_token_id = self.token_ids["eos"]
        super().__post_init__(**kwargs)

    @property
    def token_ids(self) -> dict[str, int]:
        """`tokens`, the 130B model's where the file has none."""
        return TOKENS if self.tokens is None else self.tokens

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_attention_heads

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: official names, complete."""
        native = set(OFFICIAL_NAMES.values())
        values = {key: value for key, value in super().to_diff_dict().items() if key not in (*native, "dtype")}
        names = (
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "tokens",
            "eos_token_id",
            "pad_token_id",
            "architectures",
        )
        values |= {official: getattr(self, native) for official, native in OFFICIAL_NAMES.items()}
        values |= {name: getattr(self, name) for name in names}
        return values | {
            "model_type": self.model_type,
            "torch_dtype": str(self.dtype or "float32").removeprefix("torch."),
        }


def check_architecture(values: Mapping[str, Any], where: str) -> None:
    """Refuses numbers that are none of a GLM-130B network's.

    Args:
        values: of config.json.
        where: it was read, for the message.

    Raises:
        ModelError: with the value and the fix.
    """
    check_sizes(values, SIZES, where)
    hidden, heads = values.get("hidden_size", 12288), values.get("num_attention_heads", 96)
    if hidden % heads or hidden // heads % 2:
        raise ModelError(
            f"{where}: hidden_size is {hidden} and num_attention_heads {heads}; a head must have a whole, even number of values"
        )
    tokens, vocabulary = values.get("tokens", TOKENS), values.get("vocab_size", 150528)
    if not isinstance(tokens, dict) or (missing := [name for name in _NEEDED if name not in tokens]):
        found = ", ".join(missing) if isinstance(tokens, dict) else "all"
        raise ModelError(f"{where}: tokens must map {', '.join(_NEEDED)} to their ids; missing: {found}")
    for name, token in tokens.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ModelError(
                f"{where}: tokens gives {name} the id {json.dumps(token)}; it must be from 0 to {vocabulary - 1} (vocab_size - 1)"
            )
