"""`ptuning merge-shards`: an official checkpoint that is divided among processes, as a model folder that transformers' Auto
classes load, or divided among another number of processes. In memory at any moment are one tensor and its parts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ptuning.checkpoint.finite import not_finite, problem
from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES, require_new, write_config
from ptuning.checkpoint.mp_ranks import DividedCheckpoint, DividedWriter
from ptuning.checkpoint.shards import ShardWriter, TensorLayout, total_bytes
from ptuning.checkpoint.tensors import read_object
from ptuning.config.commands import option, parse_options
from ptuning.errors import CheckpointError, ConfigError, ModelError
from ptuning.families import Family, families
from ptuning.families.division import Division
from ptuning.messages import message
from ptuning.quantization import SCALE, QuantizationConfig, RowWise, precision_of, quantize_linears

SCALE_DTYPE = torch.float16  # the official code rounds a scale to it before it divides, whatever the weights are


@dataclass(frozen=True)
class MergeOptions:
    """Which checkpoint, and what becomes of it."""

    checkpoint: str = option(..., "official folder with `latest` and the mp_rank files")
    output_dir: str = option(..., "new folder")
    config: str | None = option(None, "JSON with the network's numbers; default: those of the 130B model")
    shards: int | None = option(
        None, "don't merge: divide among so many processes, in the official format; 1 is one official file"
    )
    quantization_bit: int | None = option(
        None, "8 or 4: the layers' matrices in whole numbers, as the official code does"
    )

    def __post_init__(self):
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"--shards is {self.shards}; use 1 or more, or leave it out for a model folder")
        if self.shards is not None and self.quantization_bit is not None:
            raise ConfigError(
                "--quantization_bit is for a model folder; official divided files are quantised when they are loaded: leave "
                "--shards or --quantization_bit out"
            )


def merge_command(argv: Sequence[str]) -> None:
    """Writes the folder and says how large it is.

    Raises:
        PTuningError: an option can't be used, or as `merge_shards` and `divide_again`.
    """
    options = parse_options(MergeOptions, argv, "ptuning merge-shards", __doc__)
    output = Path(options.output_dir)
    if options.shards is not None:
        size = divide_again(options.checkpoint, output, options.shards, options.config)
        print(message("divided_again", folder=output, shards=options.shards, size=size / 1e9))
        return
    precision = None if options.quantization_bit is None else precision_of(options.quantization_bit)
    size = merge_shards(options.checkpoint, output, options.config, precision)
    print(message("merged_shards", folder=output, size=size / 1e9))


def merge_shards(
    checkpoint: str | Path,
    output: Path,
    config_file: str | Path | None = None,
    precision: RowWise | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes safetensors and config.json; a tokenizer isn't part of such checkpoints. Returns the weights' bytes.

    Args:
        checkpoint: official folder.
        output: new or empty.
        config_file: numbers of the network; None: the family's defaults.
        precision: of the layers' matrices.

    Raises:
        ModelError: no such checkpoint, or it isn't what the configuration says, or it holds NaN.
        CheckpointError: `output` isn't empty, or the disk is too small.
    """
    require_new(output, "give a new folder")
    divided = DividedCheckpoint(checkpoint)
    family, division = _family_of(divided)
    config = _config(family, config_file)
    dtype = divided.parts(family.embedding)[0].dtype
    made = _made(config, divided, division, config_file)
    if precision is not None:
        with torch.device("meta"):
            quantize_linears(made, precision)
        made.config.quantization_config = QuantizationConfig(precision.bits)
    layout = _layout(made, divided)
    _require_space(output, layout)
    output.mkdir(parents=True, exist_ok=True)
    writer, scale = ShardWriter(output, layout, max_shard_bytes), torch.empty(0)
    try:
        for name, (_, stored_in) in layout.items():
            if name not in divided.names:
                writer.write(name, scale)
                continue
            tensor = _whole(divided, division, name)
            if precision is not None and stored_in == torch.int8:
                tensor, scale = precision.quantize(tensor, SCALE_DTYPE)
            writer.write(name, tensor)
            del tensor  # before the next one is read
        write_config(output, made.config, dtype)
        writer.finish()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a model
        raise
    return total_bytes(layout)


def divide_again(checkpoint: str | Path, output: Path, count: int, config_file: str | Path | None = None) -> int:
    """The same checkpoint for another number of processes, in the official format. Returns the weights' bytes.

    Args:
        count: of processes; arguments and errors else as `merge_shards`.
    """
    require_new(output, "give a new folder")
    divided = DividedCheckpoint(checkpoint)
    family, division = _family_of(divided)
    config = _config(family, config_file)
    if (heads := family.dimensions(config).heads) % count:
        raise ConfigError(f"--shards {count}: the model has {heads} heads, which so many processes can't share")
    _made(config, divided, division, config_file)
    layout = _parts_layout(divided, division, count)
    _require_space(output, {f"{name} {index}": entry for index in range(count) for name, entry in layout.items()})
    try:
        writer = DividedWriter(output, divided.iteration, [layout] * count)
        for name in layout:
            whole = _whole(divided, division, name)
            for index in range(count):
                writer.write(index, name, division.part(name, whole, index, count))
            del whole
        writer.finish()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return count * total_bytes(layout)


def _family_of(divided: DividedCheckpoint) -> tuple[Family, Division]:
    """The family whose divided checkpoints have such names."""
    for family in families():
        if family.division is not None and family.embedding in divided.names:
            return family, family.division
    known = ", ".join(family.name for family in families() if family.division is not None)
    raise ModelError(
        f"{divided.files[0]}: has none of the tensors that a divided checkpoint of {known} has; found "
        f"{', '.join(divided.names[:5]) or 'none'}"
    )


def _config(family: Family, file: str | Path | None) -> PreTrainedConfig:
    values = {}
    if file is not None:
        if not Path(file).is_file():
            raise ModelError(f"{file}: no such file; give --config a JSON file with the network's numbers")
        values = read_object(Path(file), ModelError, "give --config a JSON file with the network's numbers")
        values.pop("model_type", None)
        family.check(values, Path(file))
    return AutoConfig.for_model(family.model_type, **values)


def _made(
    config: PreTrainedConfig, divided: DividedCheckpoint, division: Division, config_file: str | Path | None
) -> PreTrainedModel:
    """A model without weights, whose tensors are exactly those of the checkpoint."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    found = {}
    for name in divided.names:
        if name.endswith(SCALE):
            raise ModelError(
                f"{divided.files[0]}: {name}: the parts are quantised, each with its own scales, and can't be put together; give "
                "the 16-bit checkpoint (and --quantization_bit)"
            )
        try:
            shape = division.shape(name, [tuple(part.shape) for part in divided.parts(name)])
        except ValueError as cause:
            raise ModelError(f"{divided.folder / divided.iteration}: {cause}; copy the checkpoint again") from cause
        if division.how(name) != "left out":
            found[name] = shape
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        source = config_file or f"the numbers of {config.model_type} (no --config is given)"
        raise ModelError(
            f"{divided.folder}: {name} is {found.get(name, 'missing')} in {len(divided.files)} parts together, and "
            f"{expected.get(name, 'not in the network')} by {source}; {len(wrong)} tensors differ. Give --config the numbers of "
            "this checkpoint, or extract it again"
        )
    return made


def _layout(made: PreTrainedModel, divided: DividedCheckpoint) -> TensorLayout:
    layout = {}
    for name, parameter in made.named_parameters():
        if name.endswith(SCALE):
            dtype = SCALE_DTYPE
        else:
            dtype = parameter.dtype if parameter.dtype == torch.int8 else divided.parts(name)[0].dtype
        layout[name] = tuple(parameter.shape), dtype
    return layout


def _parts_layout(divided: DividedCheckpoint, division: Division, count: int) -> TensorLayout:
    """Of each of so many processes, in the order of the files."""
    layout = {}
    for name in divided.names:
        parts = divided.parts(name)
        whole = torch.empty(division.shape(name, [tuple(part.shape) for part in parts]), device="meta")
        try:
            layout[name] = tuple(division.part(name, whole, 0, count).shape), parts[0].dtype
        except ValueError as cause:
            raise ConfigError(f"--shards {count}: {cause}") from cause
    return layout


def _whole(divided: DividedCheckpoint, division: Division, name: str) -> torch.Tensor:
    tensor = division.join(name, divided.parts(name))
    if count := not_finite(tensor):
        raise ModelError(problem(divided.folder / divided.iteration, name, count))
    return tensor


def _require_space(output: Path, layout: TensorLayout) -> None:
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < (needed := total_bytes(layout)):
        raise CheckpointError(f"{output}: needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free.")
