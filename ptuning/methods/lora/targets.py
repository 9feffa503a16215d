"""Which linear layers of a base get a LoRA, by words, by the model's own names or by those in the family's files."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ptuning.errors import ConfigError
from ptuning.families import family_of

ALL, ATTENTION = "all", "attention"
_ATTENTION_PARTS = ("attn", "attention")  # in the names of the modules that hold an attention's layers


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer by its full name, but the output layer."""
    output = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output}


def linears_of(config: PreTrainedConfig) -> dict[str, nn.Linear]:
    """The same of a base that isn't loaded: its layers without numbers."""
    model_class = AutoModelForCausalLM._model_mapping[
        type(config)
    ]  # from_config would divide it among ZeRO-3's processes
    with torch.device("meta"):
        return linears(model_class(config))


def sources(names: Iterable[str], config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
    """A layer's name in the family's files → the model's layers whose rows, stacked, it is."""
    stacked = family_of(config).weight_sources([f"{name}.weight" for name in names])
    return {_layer(name): tuple(map(_layer, parts)) for name, parts in stacked.items()}


def choose(target: Sequence[str], layers: Mapping[str, nn.Linear], config: PreTrainedConfig) -> list[str]:
    """The full names of the layers meant.

    Args:
        target: `all`, `attention`, or last parts of names (`q_proj`; `query_key_value`, as official files have it).
        layers: of `linears`.
        config: of the base.

    Raises:
        ConfigError: a word that means none of them.
    """
    short: dict[str, set[str]] = {}
    for name in layers:
        short.setdefault(_last(name), set()).add(name)
    for name, parts in sources(layers, config).items():
        short.setdefault(_last(name), set()).update(parts)
    attention = {name for name in layers if any(part in _last(name.rpartition(".")[0]) for part in _ATTENTION_PARTS)}
    meanings = {ALL: set(layers), ATTENTION: attention} | short
    for word in target:
        if not meanings.get(word):
            raise ConfigError(
                f"--lora_target {word}: this base has no such layer; use {ALL}, {ATTENTION}, or some of {', '.join(short)}"
            )
    chosen = set().union(*(meanings[word] for word in target))
    return [name for name in layers if name in chosen]


def shortened(chosen: Sequence[str], layers: Iterable[str]) -> list[str]:
    """The chosen layers as peft takes them: by last parts where those mean no others, else by full names."""
    parts = {_last(name) for name in chosen}
    meant = [name for name in layers if _last(name) in parts]
    return sorted(parts if set(meant) == set(chosen) else chosen)


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
