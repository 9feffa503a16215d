"""A quantised model for vLLM: `compressed-tensors` (pack-quantized), which holds the official whole numbers and scales as they are.

transformers' own names and configuration, because vLLM's class for the official ones computes something else for some models.
No tokenizer: vLLM would make a wrong one of it without a word.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES
from ptuning.checkpoint.native import plain_tensors, write_native
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
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    (bits,) = {part.precision.bits for part in layers.values() if isinstance(part, QuantizedLinear)}
    kept = [name for name, part in layers.items() if not isinstance(part, QuantizedLinear)]
    scheme = {"quantization_config": _scheme(bits, kept)}
    return write_native(model, lambda: _tensors(model), folder, scheme, max_shard_bytes)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in plain_tensors(model):
        layer, _, last = name.rpartition(".")
        module = model.get_submodule(layer)
        if not isinstance(module, QuantizedLinear) or last == "bias":
            yield name, tensor
        elif last == f"weight{SCALE}":
            yield name, tensor[:, None]
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
