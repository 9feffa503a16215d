"""A quantised model for vLLM: `compressed-tensors` (pack-quantized), which holds the official whole numbers and scales as they are.

transformers' own names and configuration, because vLLM's class for the official ones computes something else for some models.
No tokenizer: vLLM would make a wrong one of it without a word.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES, new_folder
from ptuning.checkpoint.native import write_native_config
from ptuning.checkpoint.shards import ShardWriter
from ptuning.families import family_of
from ptuning.quantization import SCALE, QuantizedLinear

FORMAT = "compressed-tensors"


def save_compressed(model: PreTrainedModel, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Writes weights, configuration and generation configuration.

    Args:
        model: loaded in int8 or int4, nothing attached.
        folder: new or empty.

    Raises:
        CheckpointError: the folder isn't empty.
        ModelError: the model's family has no form that other programs read.
    """
    family_of(model.config).native_config(model.config)  # first: there may be no such form
    folder = new_folder(folder)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(model)}
    writer = ShardWriter(folder, layout, max_shard_bytes)
    for name, tensor in _tensors(model):
        writer.write(name, tensor)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    (bits,) = {part.precision.bits for part in layers.values() if isinstance(part, QuantizedLinear)}
    kept = [name for name, part in layers.items() if not isinstance(part, QuantizedLinear)]
    write_native_config(model, folder, {"quantization_config": _scheme(bits, kept)})
    writer.finish()
    return folder


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        module = model.get_submodule(layer)
        if not isinstance(module, QuantizedLinear) or last == "bias":
            # An output layer that multiplies by something else than what is stored is a plain one for other programs.
            yield name, getattr(module, "effective_weight", parameter)
        elif last == f"weight{SCALE}":
            yield name, parameter[:, None]
        else:
            yield f"{name}_packed", _packed(module)
            yield f"{name}_shape", torch.tensor([module.out_features, module.in_features])


def _packed(module: QuantizedLinear) -> torch.Tensor:
    """Rows of int32; the last one is filled up with zeros."""
    stored = module.precision.shifted(module.weight)
    return nn.functional.pad(stored, (0, -stored.shape[1] % 4)).view(torch.int32)


def _scheme(bits: int, kept: list[str]) -> dict[str, object]:
    """Of config.json.

    Args:
        kept: linear layers that aren't quantised.
    """
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {
        "quant_method": FORMAT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": kept,
    }
