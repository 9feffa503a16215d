"""`ptuning export` and `ptuning convert`: what was tuned, for other programs or another number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ptuning import distributed
from ptuning.checkpoint.base import base_precision, read_base_config, require_16_bit, resolve_base
from ptuning.checkpoint.compressed import FORMAT as COMPRESSED
from ptuning.checkpoint.compressed import save_compressed
from ptuning.checkpoint.manifest import describe
from ptuning.checkpoint.model_folder import new_folder, require_new, save_model_folder
from ptuning.checkpoint.native import FORMAT as VLLM
from ptuning.checkpoint.native import save_native
from ptuning.checkpoint.zero_files import convert_to_universal, merge_zero
from ptuning.config.commands import option, parse_options
from ptuning.errors import CheckpointError, ConfigError
from ptuning.families import read_config
from ptuning.loading import load_base, load_tokenizer, resolve_dtype
from ptuning.messages import message
from ptuning.methods import (
    FullMethod,
    attach_checkpoint,
    base_of,
    method_of_checkpoint,
    read_checkpoint,
    self_test,
    store_checkpoint,
)
from ptuning.methods.lora.checkpoint import read_lora
from ptuning.methods.lora.export import export_official_lora
from ptuning.methods.prefix.export import export_official, export_peft
from ptuning.methods.prefix.read import read_prefix
from ptuning.quantization import precision_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExportOptions:
    """What to write, and for whom."""

    output_dir: str = option(..., "new folder")
    ptuning_checkpoint: str | None = option(None, "a prefix, or with --merge a LoRA")
    merge: bool = option(False, "put a LoRA into its base's weights: a whole model in the official format")
    checkpoint: str | None = option(None, "checkpoint-N of a full-parameter run with --deepspeed; no GPU needed")
    format: Literal["official", "peft", "official-lora", "vllm", "compressed-tensors"] | None = option(
        None,
        "of a prefix: official or peft; of a LoRA: official-lora; vllm: of either, into a --prefix_store, or of "
        "--model_name_or_path alone; compressed-tensors: the latter quantised; a whole model of a --checkpoint or --merge is "
        "always official",
    )
    model_name_or_path: str | None = option(
        None, "default: the base that the checkpoint names, or the checkpoint itself"
    )
    quantization_bit: int | None = option(
        None, "8 or 4, with --format compressed-tensors; an official int8 or int4 folder needs none"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of a whole model; default: float32, with --merge the base's own"
    )

    def __post_init__(self):
        if self.format == COMPRESSED:
            if self.model_name_or_path is None or any(
                (self.ptuning_checkpoint, self.checkpoint, self.merge, self.dtype is not None)
            ):
                raise ConfigError(
                    f"--format {COMPRESSED} takes a model, --model_name_or_path alone, in its files' own dtype; a LoRA is merged "
                    "first (--merge), and vLLM takes prefixes by themselves"
                )
            return
        if self.quantization_bit is not None:
            raise ConfigError(
                f"--quantization_bit is for --format {COMPRESSED}; an official int8 or int4 folder is written by ptuning quantize"
            )
        if self.format == VLLM:
            if self.checkpoint is not None or self.merge:
                raise ConfigError(
                    f"--format {VLLM} takes --model_name_or_path or --ptuning_checkpoint; write the model without --format first "
                    "and give that folder as --model_name_or_path"
                )
            if self.ptuning_checkpoint is not None and self.dtype is not None:
                raise ConfigError(
                    f"--dtype: --format {VLLM} of what was tuned beside a base is always float32; leave it out"
                )
            if self.ptuning_checkpoint is None and self.model_name_or_path is None:
                raise ConfigError(f"--format {VLLM} needs --model_name_or_path (a model) or --ptuning_checkpoint")
            return
        if (self.ptuning_checkpoint is None) == (self.checkpoint is None):
            raise ConfigError(
                "give --ptuning_checkpoint (a prefix or a LoRA) or --checkpoint (a ZeRO checkpoint of all weights)"
            )
        if self.merge and (self.checkpoint is not None or self.format is not None):
            raise ConfigError(
                "--merge is for a LoRA (--ptuning_checkpoint) and writes the official format; leave --format out"
            )
        if self.checkpoint is not None and self.format not in (None, "official"):
            raise ConfigError(
                f"--format {self.format} is for what was tuned beside a base; leave it out, a whole model is written in the "
                "official format"
            )
        if self.checkpoint is None and not self.merge and (self.format is None or self.dtype is not None):
            raise ConfigError(
                "a prefix needs --format official or peft, and no --dtype: it is always float32; a LoRA needs --merge or --format "
                "official-lora (its folder is peft's own already)"
            )


def export(argv: Sequence[str]) -> None:
    """Writes a prefix or a LoRA for the official code or peft, a whole model in the official format (a ZeRO checkpoint's
    weights, or a base with a LoRA put into it), or any of them for vLLM."""
    args = parse_options(ExportOptions, argv, "ptuning export")
    if args.format == COMPRESSED:
        print(message("wrote_format", folder=_compressed(args), format=COMPRESSED))
        return
    if args.format == VLLM:
        print(message("wrote_format", folder=_vllm(args), format=VLLM))
        return
    if args.checkpoint is not None:
        base = None if args.model_name_or_path is None else resolve_base(args.model_name_or_path)
        folder = merge_zero(args.checkpoint, args.output_dir, base, resolve_dtype(args.dtype or "float32", _CPU))
        print(message("wrote_format", folder=folder, format=f"official {args.dtype or 'float32'}"))
        return
    assert args.ptuning_checkpoint is not None  # one of the two is given
    if args.merge:
        print(message("wrote_format", folder=_merge(args), format="official"))
        return
    tuned = Path(args.ptuning_checkpoint)
    read, write = _FORMATS[args.format or ""]
    checkpoint = read(tuned)
    base = resolve_base(base_of(args.model_name_or_path, args.ptuning_checkpoint))
    read_base_config(base)  # refuses other architectures
    folder = write(checkpoint, read_config(base), args.output_dir, str(base))
    print(message("wrote_format", folder=folder, format=args.format))


# --format → what reads a checkpoint, and what writes it for another program.
_FORMATS: dict[str, tuple[Callable, Callable]] = {
    "official": (read_prefix, lambda checkpoint, config, folder, base: export_official(checkpoint, config, folder)),
    "peft": (read_prefix, export_peft),
    "official-lora": (read_lora, export_official_lora),
}


def _compressed(args: ExportOptions) -> Path:
    """A model in whole numbers, quantised in its files or as it is read."""
    name = args.model_name_or_path or ""
    asked = None if args.quantization_bit is None else precision_of(args.quantization_bit)
    if base_precision(name, asked) is None:
        raise ConfigError(f"{name} is in 16 bit; give --quantization_bit 8 or 4")
    require_new(Path(args.output_dir))
    dtype = read_config(resolve_base(name)).dtype or "float32"
    return save_compressed(load_base(name, dtype=dtype, device=_CPU, precision=asked), args.output_dir)


def _vllm(args: ExportOptions) -> Path:
    """A model under its own names, or something tuned in the folder that servers and vLLM share."""
    name, store = args.model_name_or_path, Path(args.output_dir)
    if args.ptuning_checkpoint is not None:
        base = base_of(name, args.ptuning_checkpoint)
        read_base_config(resolve_base(base))
        try:
            stored, _, _ = store_checkpoint(args.ptuning_checkpoint, base, store)
        except OSError as cause:
            raise CheckpointError(f"{store}: can't be written ({cause})") from cause
        return store / (f"{stored.prefix}.safetensors" if stored.prefix else stored.lora)
    assert name is not None
    if (precision := base_precision(name)) is not None:
        raise ConfigError(f"{name} is quantised to {precision.name}; give --format {COMPRESSED}")
    require_new(store)
    dtype = args.dtype or read_config(resolve_base(name)).dtype or "float32"
    return save_native(load_base(name, dtype=dtype, device=_CPU), store)


def _merge(args: ExportOptions) -> Path:
    """The base of a checkpoint with what was tuned in its own weights."""
    checkpoint = Path(args.ptuning_checkpoint or "")
    read_checkpoint(checkpoint)
    if not (method := method_of_checkpoint(checkpoint)).merges:
        raise ConfigError(f"--merge: a {method.noun} can't be put into the base's weights; give --format instead")
    name = base_of(args.model_name_or_path, args.ptuning_checkpoint)
    require_16_bit(name, "a LoRA can't be put into quantised weights")
    folder = new_folder(args.output_dir)
    tokenizer = load_tokenizer(name)
    dtype = args.dtype or read_config(resolve_base(name)).dtype or "float32"
    model = load_base(name, dtype=dtype, device=_CPU)
    before = attach_checkpoint(model, checkpoint, name)
    self_test(model)
    method.merge(model)
    about = replace(
        before or describe(name, method.name, {}),
        method=FullMethod.name,
        settings={"merged": method.name, "from": str(checkpoint.expanduser().resolve())},
        file="",
        sha256="",
    )
    save_model_folder(model, tokenizer, about, folder, writes=True, device=_CPU)
    return folder


@dataclass(frozen=True)
class ConvertOptions:
    """Which checkpoint."""

    checkpoint: str = option(..., "checkpoint-N of a run with --deepspeed")


def convert(argv: Sequence[str]) -> None:
    """Adds DeepSpeed's universal files to a checkpoint, which any number of processes can resume from."""
    args = parse_options(ConvertOptions, argv, "ptuning convert")
    distributed.choose_deepspeed_device()
    folder = convert_to_universal(args.checkpoint)
    print(message("converted", folder=folder, checkpoint=args.checkpoint))
