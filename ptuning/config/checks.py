"""Combinations of options that can't work, refused before anything is read or loaded."""

import math
from collections.abc import Collection

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ptuning.config.engine import VLLM, check_engine
from ptuning.config.options import DATASET, Config, DataArguments, TuningArguments
from ptuning.errors import ConfigError
from ptuning.packages import missing, require
from ptuning.quantization import asked_precision

# Part of an optimizer's name → the module that has it, and what pip calls that; the first that fits.
_OPTIMIZER_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "apex": ("apex", "apex"),
    "xla": ("torch_xla", "torch_xla"),
    "npu": ("torch_npu", "torch_npu"),
    **dict.fromkeys(("torch_4bit", "torch_8bit"), ("torchao", "torchao")),
    **dict.fromkeys(("bit", "bnb", "ademamix"), ("bitsandbytes", "bitsandbytes")),
}

# Options of TrainingArguments that nothing here was made for.
_UNSUPPORTED = {
    "fsdp": "to divide the weights among GPUs use --deepspeed configs/zero3.json",
    "push_to_hub": "upload the folder when the run has ended: hf upload NAME OUTPUT_DIR",
    "use_liger_kernel": "the loss of liger-kernel is used by itself on a GPU where it is installed (pip install "
    "'ptuning[gpu]'), and its other kernels are not made for these models; leave it out",
}


def check(config: Config, given: Collection[str]) -> None:
    """Raises ConfigError with the value, the limit and the fix.

    Args:
        given: the command line's options, with their hyphens.
    """
    model, data, training = config.model, config.data, config.training
    asked_precision(model)
    if model.cpu_kernels == "fast" and training.do_train:
        raise ConfigError(
            "--cpu_kernels fast only answers: it has no gradients; leave it out, and give it to ptuning evaluate, predict, chat or "
            "serve"
        )
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ConfigError("nothing to do: give --do_train, --do_eval or --do_predict")
    if not training.output_dir:
        raise ConfigError("--output_dir is missing; give the folder for this run, e.g. --output_dir output/my-run")
    for mix in data.mix or ():
        parse_mix(mix)
    _check_sources(data, training)
    for flag, instead in _UNSUPPORTED.items():
        if getattr(training, flag):
            raise ConfigError(f"--{flag} is not supported: {instead}")
    _check_packages(training)
    if training.logging_nan_inf_filter:
        raise ConfigError("--logging_nan_inf_filter hides NaN losses; leave it off")
    if training.label_smoothing_factor:
        raise ConfigError("--label_smoothing_factor is not supported: the loss is computed only where labels are")
    if training.train_sampling_strategy not in ("group_by_length", "random", "sequential"):
        raise ConfigError(
            f"--train_sampling_strategy {training.train_sampling_strategy} is not supported; use group_by_length, random or "
            "sequential"
        )
    if training.tokens_per_batch is not None:
        _check_tokens_per_batch(data, training, given)
    if training.resume_from_checkpoint and model.ptuning_checkpoint:
        raise ConfigError(
            "--resume_from_checkpoint continues a run, --ptuning_checkpoint starts a new one from what it holds; give one"
        )
    for flag in ("early_stopping_patience", "metric_for_best_model"):
        if getattr(training, flag) is not None and not data.sources("validation"):
            raise ConfigError(f"--{flag} needs --validation_file")
    _check_engine(config)
    for flag in ("device_map", "tensor_parallel"):
        if getattr(model, flag) is not None and (training.do_train or training.do_eval):
            raise ConfigError(
                f"--{flag} {getattr(model, flag)} is for answers; training divides a model with --deepspeed configs/zero3.json: "
                f"leave {'--do_train' if training.do_train else '--do_eval'} or --{flag} out"
            )
    generation = config.generation
    answers = training.do_predict or (training.do_eval and generation.predict_with_generate)
    for flag in ("baseline", "baseline_from"):
        if getattr(generation, flag) not in (False, None) and not answers:
            raise ConfigError(f"--{flag} compares answers, and none are generated; add --do_predict, or leave it out")
    if generation.baseline and generation.baseline_from is not None:
        raise ConfigError(
            "--baseline answers with the base again, --baseline_from takes an earlier run's answers; give one"
        )


def _check_engine(config: Config) -> None:
    model, generation, training = config.model, config.generation, config.training
    check_engine(generation.engine, (model, generation), needs_store=model.ptuning_checkpoint is not None)
    if generation.engine == VLLM:
        for flag in ("do_train", "do_eval"):
            if getattr(training, flag):
                raise ConfigError(
                    f"--engine {VLLM} answers and scores a test file; --{flag} computes in this process: leave one of the two out"
                )


def _check_tokens_per_batch(data: DataArguments, training: TuningArguments, given: Collection[str]) -> None:
    option = f"--tokens_per_batch {training.tokens_per_batch}"
    if "--per_device_train_batch_size" in given:
        raise ConfigError(
            f"{option} and --per_device_train_batch_size {training.per_device_train_batch_size} both say how large a batch is; "
            "leave one out (an option in the --config file counts too)"
        )
    if data.pad_to_max_length:
        raise ConfigError(f"{option} with --pad_to_max_length: all rows would be equally long; leave one out")
    if training.train_sampling_strategy != "group_by_length":
        raise ConfigError(
            f"{option} puts rows of similar length together, and --train_sampling_strategy is "
            f"{training.train_sampling_strategy}; leave one out"
        )
    if training.auto_find_batch_size:
        raise ConfigError(
            f"{option} with --auto_find_batch_size, which looks for a number of rows; leave one out (ptuning estimate "
            "says what fits)"
        )
    if training.dataloader_drop_last:
        raise ConfigError(
            f"{option} with --dataloader_drop_last: no batch is left incomplete; leave --dataloader_drop_last out"
        )


def _check_sources(data: DataArguments, training: TuningArguments) -> None:
    for name in ("train_file", "validation_file", "test_file"):
        if any(not file.strip() for file in getattr(data, name) or ()):
            raise ConfigError(f"--{name} is given an empty name; give a file, or leave --{name} out")
    if data.dataset_config_name and not data.dataset_name:
        raise ConfigError(f"--dataset_config_name {data.dataset_config_name} needs --dataset_name")
    if data.dataset_name and data.train_file:
        raise ConfigError(
            f"--dataset_name {data.dataset_name} and --train_file {data.train_file[0]} both give the training rows; leave one "
            f"out, or read both: --train_file {data.train_file[0]} {DATASET}{data.dataset_name}:train"
        )
    used = False
    for flag, wanted, role in (
        ("do_train", "train_file", "train"),
        ("do_eval", "validation_file", "validation"),
        ("do_predict", "test_file", "test"),
    ):
        if getattr(training, flag):
            if not data.sources(role):
                raise ConfigError(f"--{flag} needs --{wanted}")
            used = used or not getattr(data, wanted)
    if data.dataset_name and not used:
        raise ConfigError(
            f"--dataset_name {data.dataset_name}: each split that is used has a file; leave one of the two out"
        )


def _check_packages(training: TuningArguments) -> None:
    there = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"--report_to {name}: no such logger; use {', '.join(sorted(INTEGRATION_TO_CALLBACK))} or none"
            )
        if name not in there:
            package = name.replace("_", "-")
            raise missing(f"--report_to {name}", package, package, instead="leave --report_to out (tensorboard)")
    optim = str(getattr(training.optim, "value", training.optim))
    found = next((package for part, package in _OPTIMIZER_PACKAGES.items() if part in optim), None)
    if found is not None:
        require(f"--optim {optim}", *found, instead="leave --optim out (adamw_torch_fused)")


def parse_mix(text: str) -> tuple[str, float]:
    """FILE:RATIO → (file, ratio): so many of the file's rows for each row of the training file.

    Raises:
        ConfigError: no ratio, or none above 0.
    """
    file, colon, number = text.rpartition(":")
    try:
        ratio = float(number) if colon else math.nan
    except ValueError:
        ratio = math.nan
    if math.isnan(ratio) or not file:
        raise ConfigError(f"--mix {text}: expected FILE:RATIO, e.g. --mix {file or text or 'general.json'}:0.1")
    if not 0 < ratio < math.inf:
        raise ConfigError(
            f"--mix {text}: the ratio is {number}; use a number above 0 (rows of {file} for each row of --train_file), e.g. 0.1"
        )
    return file, ratio
