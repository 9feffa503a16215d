"""Combinations of options that can't work or silently do something else: refused before anything is loaded, each with its fix."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from ptuning.checkpoint.base import base_precision, resolve_base
from ptuning.config import Config, TuningArguments
from ptuning.distributed import launched
from ptuning.errors import ConfigError, ModelError
from ptuning.loading import resolve_dtype
from ptuning.methods import Method
from ptuning.quantization import Precision, asked_precision
from ptuning.training.deepspeed_file import read_deepspeed
from ptuning.training.kernels import check_kernels
from ptuning.training.sequence_parallel import check_sequence_parallel

# transformers fills "auto" in for these; for the rest of zero_optimization it is wrong without a word (measured).
_NO_AUTO = {
    "stage": "transformers would take it for 0, DeepSpeed for 2; write 0, 1, 2 or 3",
    "stage3_gather_16bit_weights_on_model_save": "it would count as false, and no model would be saved; write true",
}
_DEVICES = ("none", "cpu", "nvme")


def check_combinations(config: Config, method: Method | None) -> None:
    """Refuses what can't work.

    Args:
        config: parsed options; the DeepSpeed file is read again, as it was written.
        method: what is tuned; None where nothing is.

    Raises:
        ConfigError: every problem found, one a line, each with its fix.
        ModelError: the base can't be used, or is quantised otherwise than asked for.
    """
    precision = _precision_of(config)
    values = read_deepspeed(config.training.deepspeed)
    all_weights = config.training.do_train and method is not None and not method.keeps_base
    problems = []
    if method is not None and precision is not None and (refusal := method.refusal(precision)) is not None:
        problems.append(refusal)
    if all_weights:
        problems += _dtype(config, values)
    problems += check_kernels(config, method)
    problems += check_sequence_parallel(config, method)
    if values is not None:
        problems += _auto(values)
        problems += _stage(config, values, all_weights)
        problems += _contradictions(config.training, values)
    if problems:
        head = f"--deepspeed {config.training.deepspeed}: " if _named(config.training) else ""
        text = problems[0] if len(problems) == 1 else "\n".join(["these options don't go together:", *problems])
        raise ConfigError(head + text)


def _named(training: TuningArguments) -> bool:
    return isinstance(training.deepspeed, str) and not training.deepspeed.lstrip().startswith("{")


def _dtype(config: Config, values: dict[str, Any] | None) -> Iterator[str]:
    training, model = config.training, config.model
    if model.dtype != "auto":
        device = torch.device("cpu" if training.use_cpu else "cuda")
        dtype = resolve_dtype(model.dtype, device)
        if dtype == torch.float16:
            yield (
                f"--dtype {model.dtype} tunes all weights in fp16 without loss scaling, which ends in NaN; leave --dtype out and "
                "give --fp16 true (fp32 weights, scaled loss), or --bf16 true where the GPU has bf16"
            )
        elif dtype == torch.bfloat16 and values is None:
            yield (
                f"--dtype {model.dtype} would keep the trained weights in bf16, where updates below 0.2 % of a weight are lost; "
                "leave --dtype out and give --bf16 true, which keeps them in fp32"
            )
    if values is None:
        return
    fp16, bf16 = (values.get(name) or {} for name in ("fp16", "bf16"))
    fp16_on = training.fp16 if fp16.get("enabled") == "auto" else fp16.get("enabled", training.fp16)
    bf16_on = training.bf16 if bf16.get("enabled") == "auto" else bf16.get("enabled", training.bf16)
    if fp16_on and bf16_on:
        yield 'fp16 and bf16 are both enabled; write "auto" for both and give --bf16 true or --fp16 true'
    scale = fp16.get("loss_scale", 0)
    if fp16_on and scale == 1:
        yield f'fp16.loss_scale is {scale}: fp16 without loss scaling ends in NaN; write "loss_scale": 0, which adapts it'
    if fp16_on and training.use_cpu:
        yield "DeepSpeed has no fp16 on a CPU; leave --fp16 out"


def _precision_of(config: Config) -> Precision | None:
    try:
        resolve_base(config.model.model_name_or_path)
    except ModelError:
        return None  # said where the base is loaded: faults in the data come first
    return base_precision(config.model.model_name_or_path, asked_precision(config.model))


def _auto(values: dict[str, Any]) -> Iterator[str]:
    zero = values.get("zero_optimization") or {}
    for key, why in _NO_AUTO.items():
        if zero.get(key) == "auto":
            yield f'zero_optimization.{key} is "auto", which nothing fills in: {why}'
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device not in _DEVICES:
            yield f'zero_optimization.{part}.device is "{device}"; write one of {", ".join(_DEVICES)}'
        elif device == "nvme" and not (zero.get(part) or {}).get("nvme_path"):
            yield f'zero_optimization.{part}.nvme_path is missing; name a folder on a local NVMe disk, e.g. "/local_nvme"'


def _stage(config: Config, values: dict[str, Any], all_weights: bool) -> Iterator[str]:
    training, zero = config.training, values.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage == "auto":
        return
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage is {stage!r}; write 0, 1, 2 or 3"
        return
    offloads = {part: (zero.get(part) or {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
    if stage < 3 and offloads["offload_param"] != "none":
        yield f'zero_optimization.offload_param needs stage 3, found stage {stage}; write "stage": 3 or leave offload_param out'
    if stage < 3 and offloads["offload_optimizer"] == "nvme":
        yield f'offload to NVMe needs stage 3, found stage {stage}; write "stage": 3 or offload_optimizer.device "cpu"'
    if stage < 1 and offloads["offload_optimizer"] == "cpu":
        yield 'offload_optimizer needs stage 1, 2 or 3, found stage 0; write "stage": 2'
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        yield (
            "ACCELERATE_USE_CPU is set (accelerate launch --cpu), with which DeepSpeed is silently left out; start with deepspeed "
            "or torchrun, and --use_cpu true"
        )
    if training.save_only_model and training.load_best_model_at_end:
        yield "--save_only_model with --load_best_model_at_end can't load the best state under DeepSpeed; leave one out"
    if stage < 3:
        return
    generation = config.generation
    for flag, wanted in (("baseline", generation.baseline), ("probe", generation.probe)):
        if all_weights and wanted and generation.baseline_from is None:
            yield (
                f"--{flag} with ZeRO-3 and all weights tuned: the base is gone once training has begun. Evaluate the base "
                f"first: ptuning evaluate --model_name_or_path {config.model.model_name_or_path} --test_file … --output_dir "
                "BASE_RUN; then give --baseline_from BASE_RUN"
            )
    if all_weights and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        found = zero.get("stage3_gather_16bit_weights_on_model_save", "missing")
        yield (
            f"zero_optimization.stage3_gather_16bit_weights_on_model_save is {found}: no model could be saved; write true "
            "(as in configs/zero3.json)"
        )
    if (precision := _precision_of(config)) is not None:
        yield (
            f"ZeRO stage 3 can't divide weights quantised to {precision.name}; use stage 2 (configs/zero2.json), or the 16-bit base"
        )
    if training.torch_compile:
        yield "--torch_compile with ZeRO stage 3: a compiled graph skips the hooks that gather weights; leave it out"
    if training.auto_find_batch_size:
        yield "--auto_find_batch_size with ZeRO stage 3: ranks can't retry in step; leave it out (ptuning estimate helps)"


def _contradictions(training: TuningArguments, values: dict[str, Any]) -> Iterator[str]:
    """Pairs of a DeepSpeed key and a flag that say different things. transformers finds some of them, after loading."""
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = launched()
    optimizer = (values.get("optimizer") or {}).get("params") or {}
    scheduler = (values.get("scheduler") or {}).get("params") or {}
    rows = [("train_micro_batch_size_per_gpu", values, "per_device_train_batch_size", batch)]
    whole = values.get("train_batch_size")
    if training.tokens_per_batch is not None:
        for key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
            if values.get(key) not in (None, "auto"):
                yield (
                    f"{key} is {values[key]} in the file and --tokens_per_batch {training.tokens_per_batch} makes batches of "
                    f'changing numbers of rows; write "{key}": "auto" in the file'
                )
        rows, whole = [], None
    pairs = [
        *rows,
        ("gradient_accumulation_steps", values, "gradient_accumulation_steps", steps),
        ("gradient_clipping", values, "max_grad_norm", training.max_grad_norm),
        ("optimizer.params.lr", optimizer, "learning_rate", training.learning_rate),
        ("optimizer.params.eps", optimizer, "adam_epsilon", training.adam_epsilon),
        ("optimizer.params.weight_decay", optimizer, "weight_decay", training.weight_decay),
        ("scheduler.params.warmup_max_lr", scheduler, "learning_rate", training.learning_rate),
        ("bf16.enabled", values.get("bf16") or {}, "bf16", training.bf16),
        ("fp16.enabled", values.get("fp16") or {}, "fp16", training.fp16),
    ]
    for key, place, flag, wanted in pairs:
        found = place.get(key.rpartition(".")[2])
        if found not in (None, "auto") and found != wanted:
            yield f'{key} is {_plain(found)} in the file and --{flag} is {_plain(wanted)}; write "{_last(key)}": "auto" in the file'
    if whole not in (None, "auto") and whole != batch * steps * world:
        yield (
            f"train_batch_size is {whole} in the file, and the flags give {batch} rows × {steps} accumulation steps × {world} "
            f'processes = {batch * steps * world}; write "train_batch_size": "auto" in the file'
        )
    if "gradient_clipping" not in values and training.max_grad_norm:
        yield (
            f"gradient_clipping is missing in the file, so DeepSpeed would not clip, and --max_grad_norm is "
            f'{training.max_grad_norm:g}; add "gradient_clipping": "auto" (or give --max_grad_norm 0)'
        )
    if "gradient_accumulation_steps" not in values and steps != 1:
        yield (
            f"gradient_accumulation_steps is missing in the file, which means 1, and --gradient_accumulation_steps is {steps}; "
            'add "gradient_accumulation_steps": "auto"'
        )
    total = scheduler.get("total_num_steps")
    if total not in (None, "auto") and training.max_steps > 0 and total != training.max_steps:
        yield (
            f"scheduler.params.total_num_steps is {total} in the file and --max_steps is {training.max_steps}; write "
            '"total_num_steps": "auto" in the file'
        )


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
