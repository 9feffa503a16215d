"""A complete model folder in its family's own format, written tensor by tensor; sharded weights are gathered one at a time."""

import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ptuning.checkpoint.code_files import carry_code
from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.partitioned import gathered, whole_shape
from ptuning.checkpoint.shards import ShardWriter, TensorLayout, total_bytes
from ptuning.distributed import raise_together
from ptuning.errors import CheckpointError
from ptuning.families import family_of
from ptuning.runs.files import write_atomically

MAX_SHARD_BYTES = 2 * 10**9

_SPARE = 64 * 2**20  # tokenizer, logs, file system overhead
_STATE_BYTES = {True: 12, False: 8}  # a trainable parameter: fp32 moments, and with DeepSpeed the fp32 master weight


def require_new(folder: Path, fix: str = "export into a new folder") -> None:
    """Raises CheckpointError where there is something that a written model or prefix would lie beside."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and isn't empty; {fix}.")


def new_folder(folder: str | Path) -> Path:
    """Makes a folder to write into; errors as `require_new`."""
    folder = Path(folder)
    require_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_layout(
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]], config: PreTrainedConfig, dtype: torch.dtype | None = None
) -> TensorLayout:
    """Names in files with shapes and dtypes, in the order in which `file_tensors` gives them.

    Args:
        shapes: of the model's parameters.
        dtype: of the files; default: the parameters' own.
    """
    family, layout = family_of(config), {}
    for name, sources in family.weight_sources(shapes).items():
        first, own = shapes[sources[0]]
        rows = sum(shapes[source][0][0] for source in sources)
        layout[name] = ((rows, *first[1:]), dtype or own)
        if name == family.embedding:
            layout |= {key: (tuple(x.shape), dtype or own) for key, x in family.extra_tensors(config).items()}
    return layout


def file_tensors(
    parameters: Mapping[str, nn.Parameter], config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors with their names in files, one after the other. Under ZeRO-3 each is gathered for its turn alone;
    all processes must iterate to the end, together."""
    family = family_of(config)
    for name, sources in family.weight_sources(parameters).items():
        parts = [parameters[source] for source in sources]
        with gathered(parts), torch.no_grad():
            yield name, torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
        if name == family.embedding:
            for key, tensor in family.extra_tensors(config).items():
                yield key, tensor.to(parts[0].dtype)


def write_config(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """config.json in the family's own names, replaced in one step.

    Args:
        dtype: of the weights written.
    """
    written = copy.deepcopy(config)
    written.dtype = dtype
    text = json.dumps(family_of(config).config_values(written), indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def write_rest(base: Path, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """What a model folder has besides weights: configuration, tokenizer, generation configuration, and code that it names.

    Args:
        base: where all but the configuration is copied from.
        dtype: of the weights.
    """
    beside = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in (*family_of(config).tokenizer_files, *beside):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    write_config(folder, config, dtype)
    carry_code(base, folder)


def save_model_folder(
    model: PreTrainedModel,
    tokenizer,
    manifest: Manifest | None,
    folder: Path,
    *,
    writes: bool,
    device: torch.device,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Saves weights, configuration, tokenizer, generation configuration and manifest.

    All processes call it, those that don't write too: under ZeRO-3 each tensor is gathered from all of them. The writer
    never holds more than one gathered tensor beside its own share. A model that was in the folder before stays whole until
    the new one's index replaces the old one's.

    Args:
        writes: whether this process writes.
        device: where the process group reduces.

    Raises:
        TrainingError: the folder can't be written; on all processes.
    """
    parameters, problem, writer = dict(model.named_parameters()), None, None
    try:
        if writes:
            # In a folder with an older model the new files get names of their own, so that the old ones aren't touched.
            tag = uuid.uuid4().hex[:8] if any(folder.glob("model*.safetensors*")) else ""
            writer = ShardWriter(folder, file_layout(_shapes(parameters), model.config), max_shard_bytes, tag=tag)
    except OSError as cause:
        problem = _cannot_write(folder, cause)
    raise_together(problem, device)
    for name, tensor in file_tensors(parameters, model.config):
        try:
            if writer is not None and problem is None:
                writer.write(name, tensor)
        except OSError as cause:
            problem = _cannot_write(folder, cause)  # the others wait in the next gather, so this goes on to the end
    try:
        if writer is not None and problem is None:
            tokenizer.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            write_config(folder, model.config, next(iter(parameters.values())).dtype)
            carry_code(model.config.name_or_path, folder)
            if manifest is not None:
                manifest.write(folder)
            writer.finish()
    except OSError as cause:
        problem = _cannot_write(folder, cause)
    raise_together(problem, device)


def model_bytes(model: nn.Module) -> int:
    """Disk that `save_model_folder` takes."""
    return _SPARE + total_bytes(file_layout(_shapes(dict(model.named_parameters())), model.config))


def require_space(
    folder: Path, needed: int, trainable: int, *, deepspeed: bool, device: torch.device, checks: bool
) -> None:
    """Refuses to begin a checkpoint that can't be finished.

    Args:
        needed: bytes of the model.
        trainable: numbers whose optimizer state is saved too; 0: none is.
        deepspeed: its checkpoints also hold fp32 master weights.
        checks: whether this process writes and so looks.

    Raises:
        TrainingError: not enough free disk; on all processes, with what is needed and what is free.
    """
    problem = None
    if checks:
        needed += trainable * _STATE_BYTES[deepspeed]
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            problem = (
                f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free. Nothing was "
                "written, earlier checkpoints are whole. Free some space, lower --save_total_limit, or give --save_only_model "
                "true (no optimizer state, can't be resumed), then continue with --resume_from_checkpoint true."
            )
    raise_together(problem, device)


def _shapes(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (whole_shape(parameter), parameter.dtype) for name, parameter in parameters.items()}


def _cannot_write(folder: Path, cause: OSError) -> str:
    return f"{folder}: the model can't be written ({cause}). Earlier checkpoints are whole."
