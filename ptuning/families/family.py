"""What the rest of the package asks of a model family, and the list of families.

A family is everything particular about one kind of model: how its config.json reads, what its weights are called in files,
its prompt template and special tokens, its dimensions, its rotary embedding, the attention kernel that a prefix wraps.
The base class describes any causal language model of transformers that has Llama's names; a family overrides what differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from ptuning.errors import ModelError
from ptuning.families.division import Division
from ptuning.families.template import Template
from ptuning.quantization import METHOD


@dataclass(frozen=True)
class Dimensions:
    """A model's widths.

    Args:
        layers: L.
        hidden: H.
        heads: query heads.
        groups: key/value groups G.
        head_dim: D.
        ffn: F.
        vocab: V.
        biases: on queries, keys and values.
        output_copy: the output layer multiplies by a matrix that it makes of its weight each time.
        score_bias: what is added to a score depends on the head, so that there is a mask of H·S·S numbers.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    biases: bool = True
    output_copy: bool = False
    score_bias: bool = False

    @property
    def query(self) -> int:
        """Numbers of a token's queries, heads times head dimension."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Numbers of a token's keys, groups times head dimension."""
        return self.groups * self.head_dim

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of one layer's matrices."""
        qkv = self.query + 2 * self.key
        return (qkv, self.hidden), (self.hidden, self.query), (2 * self.ffn, self.hidden), (self.hidden, self.ffn)

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer, norms and biases included."""
        biases = self.query + 2 * self.key if self.biases else 0
        return sum(rows * columns for rows, columns in self.layer_matrices) + 2 * self.hidden + biases

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return self.layers * self.layer_parameters + (2 * self.vocab + 1) * self.hidden


class Family(ABC):
    """One kind of base model."""

    name: str  # in manifests and messages
    model_type: str  # of its configuration in memory
    written_type: str = ""  # in config.json, where that is another's too
    supported: str  # the models that are known to work, for messages
    template_name: str  # written into manifests, so that evaluation can refuse another template
    example: str = ""  # hub id of a 16-bit base, for messages
    # Where it and its page are served unless asked otherwise; a service runs several side by side
    port: int = 7030
    web_port: int = 7020

    # --- told apart by content -------------------------------------------------------------------------------------------

    def claims(self, values: Mapping[str, Any], folder: Path | None = None) -> bool:
        """Whether a config.json is of this family.

        Args:
            values: in it.
            folder: it lies in, where that is known; other small files there may be looked at.
        """
        return values.get("model_type") == self.model_type

    def check(self, values: Mapping[str, Any], folder: Path) -> None:  # noqa: B027  most families have no such relative
        """Refuses a relative that this family can't compute.

        Args:
            values: of config.json.
            folder: of the model; other small files in it may be looked at.

        Raises:
            ModelError: it is one; the message says what it is and what is supported.
        """

    @abstractmethod
    def register(self) -> None:
        """Makes transformers' Auto classes read this family's folders without remote code."""

    # --- text ------------------------------------------------------------------------------------------------------------

    tokenizer_files: tuple[str, ...] = ()  # without which no tokenizer can be made

    @abstractmethod
    def template(self, tokenizer) -> Template:
        """The prompt template over a base's tokenizer."""

    # --- weights ---------------------------------------------------------------------------------------------------------

    embedding = "model.embed_tokens.weight"  # the embedding's name in files; its absence means another format
    output = "lm_head.weight"
    layer_prefix = "model.layers."
    layer_bias = ".self_attn.q_proj.bias"  # what the fingerprint reads of the first and the last layer besides
    vocabulary_key = "vocab_size"  # in config.json
    prefix_in_official_code = False  # whether the official code reads a prefix, so that one can be written for it

    division: Division | None = None  # of official checkpoints that are divided among processes; None: there are none

    def weight_sources(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Tensor name in files → names of the model's tensors whose rows, stacked, are that tensor.

        For code that streams tensors one by one, where transformers' own conversion holds many at once.

        Args:
            names: of the base's parameters, without what a method has added.
        """
        return {name: (name,) for name in names}

    def extra_tensors(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """What files hold besides parameters; written right after the embedding."""
        return {}

    def quantized_bits(self, values: Mapping[str, Any]) -> int | None:
        """Of a base whose files are quantised, by its config.json; None: they aren't."""
        found = values.get("quantization_config") or {}
        return found.get("bits") if found.get("quant_method") == METHOD else None

    def config_values(self, config: PreTrainedConfig) -> dict[str, Any]:
        """config.json as it is written."""
        return config.to_diff_dict()

    @staticmethod
    def register_classes(config: type, model: type, tokenizer: type) -> None:
        """Makes transformers' Auto classes take them for configurations of this `model_type`."""
        AutoConfig.register(config.model_type, config, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, slow_tokenizer_class=tokenizer, exist_ok=True)

    def native_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same for a folder under the model's own names, which transformers and vLLM read without this package.

        Raises:
            ModelError: nothing but this package computes such a model.
        """
        return config

    def tensor_parallel_refusal(self, config: PreTrainedConfig) -> str | None:
        """Why a base's matrices can't be divided among processes by heads; None: they can."""
        return None if getattr(config, "base_model_tp_plan", None) else "this architecture has no plan for it"

    def sequence_parallel_refusal(self, config: PreTrainedConfig) -> str | None:
        """Why a row's positions can't be divided among processes that train on it; None: they can."""
        biased = self.dimensions(config).score_bias
        return (
            "this base's attention adds a bias to each head's scores, which is made for whole rows" if biased else None
        )

    def vllm_refusal(self, config: PreTrainedConfig) -> str | None:
        """Why vLLM would compute something else from files in this family's own format, without a word; None: it wouldn't."""
        return None

    # --- shapes ----------------------------------------------------------------------------------------------------------

    def dimensions(self, config: PreTrainedConfig) -> Dimensions:
        """The model's widths, for the prefix and the memory estimate."""
        heads = config.num_attention_heads
        return Dimensions(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            groups=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            biases=bool(getattr(config, "attention_bias", False)),
        )

    # --- modules that kernels replace ------------------------------------------------------------------------------------

    norm: type[nn.Module] | None = LlamaRMSNorm  # with `weight` and `variance_epsilon`; None: it has another kind
    # With a linear `gate_up_proj` whose two halves are gate and up, and `down_proj`; None: it has another kind.
    feed_forward: type[nn.Module] | None = None
    # `input_layernorm`, `self_attn` with rotary in pairs of neighbours, `post_attention_layernorm`, `mlp`, the latter two kinds
    # as above; None: it has other layers.
    pre_norm_layer: type[nn.Module] | None = None

    def gates_with_silu(self, config: PreTrainedConfig) -> bool:
        """Whether the feed-forward part computes silu(gate) · up."""
        return getattr(config, "hidden_act", None) in ("silu", "swish")

    # --- attention -------------------------------------------------------------------------------------------------------

    # Why the engine, which computes a prompt in pieces and keeps them for the next one, can't answer; empty: it can
    engine_refusal: str = ""

    eager_attention: Callable = staticmethod(eager_attention_forward)

    def rotate_keys(self, keys: torch.Tensor, offset: int, config: PreTrainedConfig) -> torch.Tensor:
        """Keys (…, D) as if they stood `offset` positions later: what turns raw prefix keys into peft's and vLLM's form.

        Raises:
            ModelError: this family's rotary embedding isn't known here.
        """
        raise ModelError(f"{self.name}: a prefix can't be exported to other formats, its rotary embedding isn't known")


_FAMILIES: dict[str, Family] = {}


def add_family(family: Family) -> None:
    """Makes a family known, and its folders readable by transformers' Auto classes."""
    _FAMILIES[family.name] = family
    family.register()


def families() -> list[Family]:
    """All that are known, in the order in which they were added."""
    return list(_FAMILIES.values())


def family_of(config: PreTrainedConfig | Mapping[str, Any], folder: Path | None = None) -> Family:
    """The family of a model's configuration, or of the values in a config.json.

    Args:
        config: either.
        folder: of the config.json; some families can't be told apart without it.

    Raises:
        ModelError: none claims it.
    """
    values = config if isinstance(config, Mapping) else {"model_type": config.model_type}
    for family in _FAMILIES.values():
        if family.claims(values, folder):
            return family
    known = " or ".join(dict.fromkeys(repr(family.written_type or family.model_type) for family in _FAMILIES.values()))
    supported = "; ".join(family.supported for family in _FAMILIES.values())
    raise ModelError(f"model_type is {values.get('model_type')!r}, expected {known}. Supported: {supported}.")


def read_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration in a base's folder, without remote code.

    Raises:
        ModelError: a value has another type than it must.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except StrictDataclassError as cause:
        raise ModelError(f"{folder}: can't be loaded: config.json: {' '.join(str(cause).split())}") from cause
