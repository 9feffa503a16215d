"""The one way in for training, evaluation, serving and users' own code: base, tokenizer, prefix, checked against each other."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.generic import ContextManagers

from ptuning.checkpoint.base import (
    base_precision,
    check_tokenizer,
    check_weights,
    read_base_config,
    require_16_bit,
    resolve_base,
    whole_folder,
)
from ptuning.checkpoint.divided import check_devices, check_division, load_divided
from ptuning.checkpoint.finite import require_finite
from ptuning.checkpoint.manifest import read_manifest
from ptuning.checkpoint.partitioned import load_partitioned
from ptuning.checkpoint.tensors import TensorFiles
from ptuning.errors import ConfigError, ModelError
from ptuning.families import Template, family_of, read_config
from ptuning.messages import message
from ptuning.methods import attach_checkpoint, check_template, read_checkpoint, self_test
from ptuning.quantization import Precision, chosen, convert_rest, precision_in

log = logging.getLogger("ptuning")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
}
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")


def load_model(
    model_name_or_path: str | Path,
    ptuning_checkpoint: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization_bit: int | None = None,
    quantization: str | None = None,
    double_quantization: bool = False,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
    say: Callable[[str], object] = log.warning,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base, with the prefix of a checkpoint attached if one is given, ready for `generate`.

    Args:
        model_name_or_path: folder in the official format, a hub id, or modelscope:OWNER/NAME. No remote code is run.
        ptuning_checkpoint: prefix folder (this package's, the official trainer's or peft's); length and projection are
            inferred.
        dtype: of the base; auto is fp32 on a CPU, bf16 on a GPU that has it, else fp16; fp16 on a CPU becomes bf16. The prefix
            stays fp32.
        device: default: the accelerator if there is one.
        attn_implementation: sdpa (default), eager, flex_attention or flash_attention_2.
        quantization_bit: 8 or 4: the base's matrices are quantised as they are read, which is what the official --quantization_bit
            means. An official int8 or int4 folder needs none.
        quantization: nf4: the same by bitsandbytes.
        double_quantization: with nf4, scales in 8 bit.
        device_map: auto: the base's layers are divided among the GPUs of this process.
        tensor_parallel: its matrices are divided among so many processes, which torchrun has started and which must all make the
            same calls.
        say: gets one line where the dtype isn't the one asked for.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        ModelError: the base is missing, incomplete, quantised otherwise, has NaN in it, or is another architecture.
        CheckpointError: the checkpoint is damaged, belongs to another base or template, or has no effect.
        ConfigError: unknown dtype, attention implementation or precision; a base or checkpoint that can't be divided so.
    """
    precision = chosen(quantization_bit, quantization, double_quantization)
    # What reads fast is checked first, so that a wrong path is known before 12 GB are read.
    tokenizer = load_tokenizer(model_name_or_path)
    if ptuning_checkpoint is not None:
        read_checkpoint(ptuning_checkpoint)
    model = load_base(
        model_name_or_path,
        dtype=computed_dtype(dtype, _device(device), say),
        device=device,
        attn_implementation=attn_implementation,
        precision=precision,
        device_map=device_map,
        tensor_parallel=tensor_parallel,
    )
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{model_name_or_path}: tokenizer.model has {len(tokenizer)} tokens and the model {model.config.vocab_size} "
            f"({family_of(model.config).vocabulary_key}); the two belong to different models."
        )
    if ptuning_checkpoint is not None:
        attach_checkpoint(model, ptuning_checkpoint, model_name_or_path)
        self_test(model)
    return model, tokenizer


def load_base(
    model_name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    precision: Precision | None = None,
    device_map: str | None = None,
    tensor_parallel: int | None = None,
) -> PreTrainedModel:
    """Loads the base alone, in eval mode; arguments and errors as in `load_model`.

    Args:
        precision: in which its matrices are asked for.

    With a live DeepSpeed ZeRO-3 configuration the weights are partitioned while loading and `device` is decided by DeepSpeed.
    """
    device = _device(device)
    torch_dtype = resolve_dtype(dtype, device)
    if attn_implementation not in (None, *ATTENTION):
        raise ConfigError(f"attn_implementation is {attn_implementation!r}; use one of {', '.join(ATTENTION)}.")
    read_base_config(resolve_base(model_name_or_path))
    stored = base_precision(model_name_or_path, precision)
    check_division(device_map, tensor_parallel, read_config(resolve_base(model_name_or_path)), stored)
    folder = whole_folder(model_name_or_path)
    check_weights(folder)
    manifest = read_manifest(folder)
    if manifest is not None:  # a fully tuned model says which template it was trained with
        check_template(manifest, folder, family_of(read_base_config(folder)).template_name)
    if is_deepspeed_zero3_enabled():
        require_16_bit(model_name_or_path, "ZeRO stage 3 can't divide quantised weights", precision)
        return _load_partitioned(folder, torch_dtype, attn_implementation).eval()
    options: dict[str, Any] = {
        "dtype": torch_dtype,
        "attn_implementation": attn_implementation,
        "ignore_mismatched_sizes": True,  # reported below, with names and shapes
        "output_loading_info": True,
    }
    if device_map is not None:
        options["device_map"] = device_map
    elif device.type != "cpu" and tensor_parallel is None:
        # Straight onto the device: a copy in the host's memory first would take 12 GB there.
        options["device_map"] = {"": device}
    try:
        if tensor_parallel is not None:
            model, info = load_divided(folder, read_config(folder), tensor_parallel, options)
            _read_the_rest(model, folder)
        elif stored is not None:
            model, info = _load_quantized(folder, stored, options)
        else:
            config = read_config(folder)
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=False, **options
            )
    except (OSError, ValueError, ImportError, RuntimeError, TypeError) as cause:
        if isinstance(cause, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{model_name_or_path}: can't be loaded: {_short(cause)}") from cause
    _check_loading_info(info, model_name_or_path)
    check_devices(getattr(model, "hf_device_map", {}), model_name_or_path)
    require_finite(dict(model.named_parameters()), model.config, folder)
    return model.eval()


def _load_quantized(folder: Path, precision: Precision, options: dict[str, Any]) -> tuple[PreTrainedModel, dict]:
    """A base with quantised matrices, and transformers' report.

    What is in memory at any moment is what is loaded already and one file: transformers would map all files at once.

    Args:
        options: of `from_pretrained`.
    """
    files, config = TensorFiles.find(folder, ModelError), read_config(folder)
    if files is None or (embedding := family_of(config).embedding) not in files.files:
        raise ModelError(f"{folder}: no weights in the official format.")
    # The arithmetic of quantising, and the scales, are in the files' own dtype.
    given = {"state_dict": files.unread(), "dtype": files.dtype(embedding)}
    if precision_in(config) is None:  # else transformers finds it there
        given["quantization_config"] = precision.config(options["dtype"])
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    model, info = model_class.from_pretrained(None, config=config, **(options | given))
    convert_rest(model, options["dtype"])
    _read_the_rest(model, folder)
    return model, info


def _read_the_rest(model: PreTrainedModel, folder: Path) -> None:
    """What `from_pretrained` does besides, of a model whose weights it didn't read from a folder."""
    model.config.name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _load_partitioned(folder: Path, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The base with its weights divided among the processes by the live DeepSpeed ZeRO-3 configuration."""
    config = read_config(folder)
    config.dtype = dtype
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    # transformers' own way to make an empty model under zero.Init
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        model = model_class(config)
    load_partitioned(model, folder)
    _read_the_rest(model, folder)
    return model


def load_tokenizer(model_name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a base's folder.

    Raises:
        ModelError: no such folder, another architecture, or tokenizer.model is missing or damaged.
    """
    folder = resolve_base(model_name_or_path)
    read_base_config(folder)
    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, TypeError) as cause:
        raise ModelError(
            f"{model_name_or_path}: tokenizer.model can't be read ({str(cause).splitlines()[0]}); copy it again from the "
            "official model."
        ) from cause


def load_template(model_name_or_path: str | Path) -> Template:
    """The prompt template of a base, over its tokenizer; errors as `load_tokenizer`."""
    tokenizer = load_tokenizer(model_name_or_path)
    return family_of(read_base_config(resolve_base(model_name_or_path))).template(tokenizer)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A name, a torch.dtype or `auto` → the dtype of the base on this device.

    Raises:
        ConfigError: none of them.
    """
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float16
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype!r}; use auto, float32, bfloat16 or float16.")
    return found


def computed_dtype(dtype: str | torch.dtype, device: torch.device, say: Callable[[str], object]) -> torch.dtype:
    """As `resolve_dtype`, for a base that computes: float16, 13 times slower than bfloat16 on a CPU, becomes that there.

    Args:
        say: gets one line where it does.
    """
    found = resolve_dtype(dtype, device)
    if found == torch.float16 and device.type == "cpu":
        say(message("no_float16_on_cpu"))
        return torch.bfloat16
    return found


def _short(cause: Exception, most: int = 500) -> str:
    """An error's text; transformers' can have thousands of characters, with every tensor's name."""
    text = " ".join(str(cause).split())
    return text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device(device)


def _check_loading_info(info: dict, name: str | Path) -> None:
    for problem in ("missing", "unexpected", "mismatched"):
        found = info.get(f"{problem}_keys", ())
        keys = sorted(key if isinstance(key, str) else _mismatch(*key) for key in found)
        keys = [
            key
            for key in keys
            if "rotary_emb" not in key and "rotary_pos_emb" not in key and "prefix_encoder" not in key
        ]
        if keys:
            raise ModelError(
                f"{name}: {len(keys)} {problem} weights: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}. The folder is "
                "incomplete or not a whole checkpoint; copy or download it again."
            )
    if info.get("error_msgs"):
        raise ModelError(f"{name}: weights can't be loaded: {info['error_msgs']}")


def _mismatch(key: str, in_file: torch.Size, in_config: torch.Size) -> str:
    return f"{key} {tuple(in_file)} in the file and {tuple(in_config)} by config.json"
