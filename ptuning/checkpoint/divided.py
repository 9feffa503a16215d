"""A base that several devices compute together, for answers: its matrices divided among processes (tensor parallelism), or its
layers among the GPUs of one process (device map).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from ptuning import distributed
from ptuning.checkpoint.partitioned import require_tensors
from ptuning.checkpoint.tensors import TensorFiles, UnreadTensor
from ptuning.errors import ConfigError, ModelError
from ptuning.families import family_of
from ptuning.quantization import Precision


def check_division(
    device_map: str | None, tensor_parallel: int | None, config: PreTrainedConfig, precision: Precision | None
) -> None:
    """Refuses what would be divided wrong.

    Args:
        device_map: "auto" or None.
        tensor_parallel: number of processes or None.
        precision: in which the base's matrices are stored.

    Raises:
        ConfigError: option, value and fix.
    """
    if device_map not in (None, "auto"):
        raise ConfigError(f"--device_map is {device_map!r}; use auto, or leave it out")
    if device_map is None and tensor_parallel is None:
        return
    asked = "--device_map auto" if device_map else f"--tensor_parallel {tensor_parallel}"
    if precision is not None:
        raise ConfigError(
            f"{asked}: a base in {precision.name} isn't divided; leave it out, or give the 16-bit base without quantisation"
        )
    if tensor_parallel is None:
        return
    if device_map is not None:
        raise ConfigError("--device_map divides layers, --tensor_parallel matrices; give one of the two")
    started = distributed.launched()
    if tensor_parallel < 2 or started != tensor_parallel:
        raise ConfigError(
            f"{asked} with {started} {'process' if started == 1 else 'processes'}; start as many as divide the model, 2 or more: "
            f"torchrun --nproc-per-node {max(tensor_parallel, 2)} -m ptuning.cli …"
        )
    family, sizes = family_of(config), family_of(config).dimensions(config)
    if (why := family.tensor_parallel_refusal(config)) is not None:
        raise ConfigError(f"{asked}: {why}; give --device_map auto, which divides layers, or leave it out")
    if sizes.groups % tensor_parallel:
        raise ConfigError(
            f"{asked}: this model has {sizes.groups} groups of keys and values, which {tensor_parallel} processes can't divide "
            f"evenly; use {' or '.join(str(n) for n in range(2, sizes.groups + 1) if sizes.groups % n == 0) or '--device_map auto'}"
        )


def load_divided(
    folder: Path, config: PreTrainedConfig, processes: int, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict]:
    """A base with its share of each matrix, by transformers' plan for the architecture, and transformers' report.

    transformers itself reads only tensors that are divided as they lie in the file; a fused query_key_value is not. So each of the
    model's tensors is given to it as rows of a file's, read when they are needed.

    Args:
        folder: in the family's official format.
        processes: of the running group, that have a share each.
        options: of `from_pretrained`.

    Raises:
        ModelError: a tensor is missing or has another shape.
    """
    distributed.join()
    files = TensorFiles.find(folder, ModelError)
    if files is None:
        raise ModelError(f"{folder}: no weights.")
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    family = family_of(config)
    require_tensors(folder, files, parameters, family)
    rows: dict[str, UnreadTensor] = {}
    for name, parts in family.weight_sources(parameters).items():
        first = 0
        for part in parts:
            last = first + len(parameters[part])
            rows[part] = UnreadTensor(files, name, (first, last))
            first = last
    plan = DistributedConfig(tp_size=processes)
    model, info = model_class.from_pretrained(None, config=config, state_dict=rows, distributed_config=plan, **options)
    distributed.divide()
    return model, info


def check_devices(devices: Mapping[str, Any], name: str | Path) -> None:
    """Refuses layers that a device map leaves outside the accelerators.

    Args:
        devices: module → device, of transformers' `hf_device_map`.
        name: of the base.

    Raises:
        ModelError: some are in the host's memory or on disk, from where each answer would fetch them.
    """
    places = {str(device) for device in devices.values()}
    outside = sorted(places & {"cpu", "disk"})
    if outside and places - {"cpu", "disk"}:
        count = sum(str(device) in outside for device in devices.values())
        raise ModelError(
            f"{name}: --device_map auto leaves {count} of {len(devices)} parts on {' and '.join(outside)}, because the GPUs "
            "have too little memory; use more GPUs, or one with --quantization nf4"
        )
