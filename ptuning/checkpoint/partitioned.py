"""Loads a base into a model whose weights DeepSpeed ZeRO-3 has divided among the processes, one tensor at a time.

transformers 5.23 can't: its splitting of query_key_value looks at the model's shapes, which are 0 while partitioned, and it
holds the whole model in the memory of process 0.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ptuning.checkpoint.finite import not_finite, problem
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.distributed import raise_together
from ptuning.errors import ModelError
from ptuning.families import Family, family_of


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds only a share of this parameter here."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's own shape, also where only a share is here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Inside, the parameters are whole. All processes must enter together.

    Args:
        modifier_rank: process whose changes are kept; None = they are only read.
    """
    parameters = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def load_partitioned(model: nn.Module, folder: Path) -> None:
    """Fills a freshly made, partitioned model from an official folder.

    Process 0 reads; no process ever holds more than its share and one tensor (the embedding is the largest: 0.5 GB of the
    6B model in 16 bit).

    Args:
        model: made under `deepspeed.zero.Init`.
        folder: .bin or safetensors in the official format.

    Raises:
        ModelError: a tensor is missing, has another shape, or values that are no numbers; on all processes alike.
    """
    files = TensorFiles.find(folder, ModelError)
    if files is None:
        raise ModelError(f"{folder}: no weights.")
    parameters = dict(model.named_parameters())
    family = family_of(model.config)
    plan = family.weight_sources(parameters)
    require_tensors(folder, files, parameters, family)
    broken = None
    for file_name, names in plan.items():
        parts = [parameters[name] for name in names]
        with gathered(parts, modifier_rank=0):
            if dist.get_rank() == 0:
                tensor = files.read(file_name)
                if broken is None and (count := not_finite(tensor)):
                    broken = problem(files.files[file_name], file_name, count)  # the others wait in the next gather
                with torch.no_grad():
                    for part, rows in zip(parts, tensor.split([part.shape[0] for part in parts]), strict=True):
                        part.copy_(rows)
    raise_together(broken, next(iter(parameters.values())).device, ModelError)


def require_tensors(folder: Path, files: TensorFiles, parameters: Mapping[str, nn.Parameter], family: Family) -> None:
    """Raises ModelError where a folder's tensors aren't those of a model, by name and shape.

    Args:
        parameters: of the model; nothing of them but the shapes is read.
    """
    plan = family.weight_sources(parameters)
    missing = sorted(set(plan) - set(files.files))
    if missing:
        more = ", …" if len(missing) > 5 else ""
        raise ModelError(
            f"{folder}: {len(missing)} missing weights: {', '.join(missing[:5])}{more}. The folder is incomplete or not a "
            f"{family.name} checkpoint; copy or download it again."
        )
    for file_name, names in plan.items():
        shapes = [whole_shape(parameters[name]) for name in names]
        expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if files.shape(file_name) != expected:
            raise ModelError(
                f"{folder}: {file_name} is {files.shape(file_name)} in the file and {expected} by config.json; the folder is not "
                "what its config.json says. Copy or download it again."
            )
