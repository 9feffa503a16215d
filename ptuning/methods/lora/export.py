"""Writes a LoRA for peft on the family's own code, where several layers of the model are one layer of its files, and for vLLM.

Shapes: I and O widths of a linear layer, r rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ptuning.checkpoint.model_folder import new_folder
from ptuning.errors import CheckpointError
from ptuning.methods.lora.checkpoint import (
    CONFIG,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    PEFT,
    WEIGHTS,
    LoraCheckpoint,
    for_base,
)
from ptuning.methods.lora.targets import linears_of, shortened, sources
from ptuning.methods.store import LORA, Stored, digest, mark_used, save_readable
from ptuning.runs.files import write_atomically


def export_official_lora(
    checkpoint: LoraCheckpoint, base_config: PreTrainedConfig, folder: str | Path, base_name: str
) -> Path:
    """peft's folder under the layer names of official files, as adapters of 2023 have it: any peft loads it on the official code.

    Layers that are one there become one: their first factors stacked, their second ones as blocks on a diagonal; where they
    share the first factor, as in an adapter that came from there, the layer is what it was. One rank holds for all layers:
    thinner ones are filled up with zeros. A scale of the square root's (rsLoRA) becomes an ordinary alpha.

    Args:
        base_config: of the base the LoRA belongs to.
        folder: new or empty.
        base_name: written as `base_model_name_or_path`.

    Raises:
        CheckpointError: the folder isn't empty, the LoRA belongs to another base, or it is a DoRA on only some of the layers
            that are one.
    """
    layers = linears_of(base_config)
    arguments, tensors = for_base(checkpoint, layers, base_config)
    placed = sources(layers, base_config)
    scales = _scales(arguments, tensors)
    scale = next(iter(scales.values()))
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, parts in placed.items():
        if any(part in scales for part in parts):
            joined[name] = _join(parts, layers, tensors, {part: value / scale for part, value in scales.items()}, name)
    folder, rank = new_folder(folder), max(len(each[FACTOR_A]) for each in joined.values())
    named: dict[str, torch.Tensor] = {}
    for name, each in joined.items():
        missing = rank - len(each[FACTOR_A])
        each[FACTOR_A] = nn.functional.pad(each[FACTOR_A], (0, 0, 0, missing))
        each[FACTOR_B] = nn.functional.pad(each[FACTOR_B], (0, missing))
        named |= {f"{PEFT}{name}{part}": tensor.contiguous() for part, tensor in each.items()}
    alpha = scale * rank
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": checkpoint.settings.lora_dropout,
        "target_modules": shortened(list(joined), placed),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    } | ({"use_dora": True} if checkpoint.settings.use_dora else {})
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / WEIGHTS[1], lambda path: torch.save(named, path))
    write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def export_vllm(checkpoint: LoraCheckpoint, base_config: PreTrainedConfig, store: Path, base_name: str) -> Stored:
    """peft's folder with one rank and scale 1 for all layers, because vLLM reads neither patterns nor a rank of each layer.

    Args:
        base_config: of the base the LoRA belongs to.
        store: may hold others; the folder's name there is that of its content.
        base_name: written as `base_model_name_or_path`.

    Raises:
        CheckpointError: the LoRA belongs to another base, or is a DoRA.
        OSError: it can't be written.
    """
    if checkpoint.settings.use_dora:
        raise CheckpointError(
            f"{checkpoint.folder}: is a DoRA, which vLLM can't compute; merge it into its base (ptuning export --merge)"
        )
    arguments, tensors = for_base(checkpoint, linears_of(base_config), base_config)
    scales = _scales(arguments, tensors)
    rank = max(len(tensors[layer + FACTOR_A]) for layer in scales)
    named: dict[str, torch.Tensor] = {}
    for layer, scale in sorted(scales.items()):
        first, second = tensors[layer + FACTOR_A], tensors[layer + FACTOR_B]
        missing = rank - len(first)
        named[f"{PEFT}{layer}{FACTOR_A}"] = nn.functional.pad(first, (0, 0, 0, missing)).contiguous()
        named[f"{PEFT}{layer}{FACTOR_B}"] = nn.functional.pad(second * scale, (0, missing)).contiguous()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": arguments["target_modules"],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    name = f"{LORA}{digest(named.values())}"
    folder, text = store / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    if not mark_used(folder / CONFIG):  # written last, so that a folder with it is whole
        write_atomically(folder / WEIGHTS[0], lambda path: save_readable(named, path))
        write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return Stored(lora=name)


def _scales(arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """By layer, what the product of its factors is multiplied by."""
    from peft.utils.other import get_pattern_key

    found = {}
    for name, tensor in tensors.items():
        if name.endswith(FACTOR_A):
            layer = name.removesuffix(FACTOR_A)
            patterns = arguments["alpha_pattern"]
            alpha = patterns.get(get_pattern_key(patterns.keys(), layer), arguments["lora_alpha"])
            found[layer] = alpha / (len(tensor) ** 0.5 if arguments["use_rslora"] else len(tensor))
    return found


def _join(
    parts: tuple[str, ...],
    layers: Mapping[str, nn.Linear],
    tensors: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
    name: str,
) -> dict[str, torch.Tensor]:
    """The factors of one layer of the files, whose output is that of the parts one after the other.

    Args:
        scales: by which a part's product is larger than that of the whole.
        name: of the layer, for messages.
    """
    firsts = [tensors[part + FACTOR_A] for part in parts if part in scales]
    shared = len(firsts) == len(parts) and all(torch.equal(firsts[0], first) for first in firsts)
    first, columns, start = firsts[0] if shared else torch.cat(firsts), [], 0
    for part in parts:
        rows = first.new_zeros(layers[part].out_features, len(first))
        if part in scales:
            second = tensors[part + FACTOR_B] * scales[part]
            place = 0 if shared else start
            rows[:, place : place + second.shape[1]] = second
            start += second.shape[1]
        columns.append(rows)
    joined = {FACTOR_A: first, FACTOR_B: torch.cat(columns)}
    lengths = [tensors[part + MAGNITUDE] for part in parts if part + MAGNITUDE in tensors]
    if lengths:
        if len(lengths) < len(parts):
            present = ", ".join(part for part in parts if part in scales)
            raise CheckpointError(
                f"{name} is one layer in official files, and this DoRA is on only some of its parts ({present}), whose "
                "lengths alone aren't enough; merge it (--merge) instead."
            )
        joined[MAGNITUDE] = torch.cat(lengths)
    return joined
