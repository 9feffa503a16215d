"""`ptuning quantize`: a 16-bit base as an official int8 or int4 folder, with one tensor and its result in memory at a time."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptuning.checkpoint.base import check_tokenizer, check_weights, require_16_bit, whole_folder
from ptuning.checkpoint.finite import not_finite, problem
from ptuning.checkpoint.manifest import read_manifest
from ptuning.checkpoint.model_folder import MAX_SHARD_BYTES, file_layout, require_new, write_rest
from ptuning.checkpoint.partitioned import require_tensors
from ptuning.checkpoint.shards import ShardWriter, TensorLayout, total_bytes
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.config.commands import option, parse_options
from ptuning.errors import CheckpointError, ModelError
from ptuning.families import family_of, read_config
from ptuning.messages import message
from ptuning.quantization import SCALE, QuantizationConfig, RowWise, precision_of, quantize_linears


@dataclass(frozen=True)
class QuantizeOptions:
    """Which model, and how small."""

    model: str = option(..., "folder of a 16-bit model, also a fully tuned one", aliases=("--model_name_or_path",))
    bits: int = option(..., "8 or 4", aliases=("--quantization_bit",))
    output_dir: str = option(..., "new folder")


def quantize_command(argv: Sequence[str]) -> None:
    """Writes the folder and says how large it is.

    Raises:
        ConfigError: an option can't be used.
        PTuningError: as `quantize_folder`.
    """
    options = parse_options(QuantizeOptions, argv, "ptuning quantize", __doc__)
    folder = quantize_folder(options.model, precision_of(options.bits), options.output_dir)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(message("wrote_quantised", folder=folder, bits=options.bits, size=size / 1e9))


def quantize_folder(
    model: str | Path, precision: RowWise, output: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Writes what `--quantization_bit` makes of a model, in the official names, with its tokenizer and other files.

    Args:
        model: folder in its family's format, a hub id, or modelscope:OWNER/NAME.
        precision: of the written matrices.
        output: new or empty.

    Raises:
        ModelError: the model can't be used, is quantised, or holds NaN.
        CheckpointError: `output` isn't empty, or the disk is too small.
    """
    base, output = whole_folder(model), Path(output)
    require_16_bit(base, "rounding a second time loses more")
    check_weights(base)
    check_tokenizer(base)
    require_new(output, "give a new folder")
    files, config = TensorFiles.find(base, ModelError), read_config(base)
    assert files is not None  # check_weights
    family = family_of(config)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
        require_tensors(base, files, dict(made.named_parameters()), family)
        quantize_linears(made, precision)
    made.config.quantization_config = QuantizationConfig(precision.bits)
    layout = _layout(made, files)
    output.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output).free) < (needed := total_bytes(layout)):
        raise CheckpointError(f"{output}: needs {needed / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free.")
    writer, scale = ShardWriter(output, layout, max_shard_bytes), torch.empty(0)
    try:
        for name, (_, dtype) in layout.items():
            if dtype == torch.int8:
                stored, scale = precision.quantize(_read(files, name))
                writer.write(name, stored)
                del stored  # before the next one is read
            elif name.endswith(f".weight{SCALE}"):
                writer.write(name, scale)
            elif name in files.files:
                writer.write(name, _read(files, name))
            else:
                writer.write(name, family.extra_tensors(config)[name].to(dtype))
        write_rest(base, output, made.config, files.dtype(family.embedding))
        if (manifest := read_manifest(base)) is not None:  # of a fully tuned model
            manifest.write(output)
        writer.finish()
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half a model
        raise
    return output


def _layout(made: PreTrainedModel, files: TensorFiles) -> TensorLayout:
    """What is written: every tensor in the dtype it has in the 16-bit files, scales in that of their matrices."""
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in made.named_parameters()}
    other = files.dtype(family_of(made.config).embedding)
    layout = {}
    for name, (shape, dtype) in file_layout(shapes, made.config).items():
        source = name.removesuffix(SCALE)
        own = files.dtype(source) if source in files.files else other
        layout[name] = shape, dtype if dtype == torch.int8 else own
    return layout


def _read(files: TensorFiles, name: str) -> torch.Tensor:
    tensor = files.read(name)
    if count := not_finite(tensor):
        raise ModelError(problem(files.files[name], name, count))
    return tensor
