"""`ptuning train --help`: the options that people use, in groups; --help_all shows every one."""

import argparse
from collections.abc import Mapping, Sequence

TRAINING = {
    "model": ("model_name_or_path", "ptuning_checkpoint", "dtype"),
    "data": (
        "train_file",
        "validation_file",
        "test_file",
        "prompt_column",
        "response_column",
        "history_column",
        "max_source_length",
        "max_target_length",
    ),
    "method": ("method", "pre_seq_len", "prefix_projection", "lora_rank"),
    "training": (
        "learning_rate",
        "per_device_train_batch_size",
        "tokens_per_batch",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "gradient_checkpointing",
        "deepspeed",
        "save_steps",
        "resume_from_checkpoint",
    ),
    "evaluation": ("do_predict", "baseline", "probe"),
    "output": ("output_dir", "overwrite_output_dir"),
}

EVALUATION = {
    "model": ("model_name_or_path", "ptuning_checkpoint", "dtype", "device_map", "tensor_parallel"),
    "data": (
        "test_file",
        "prompt_column",
        "response_column",
        "history_column",
        "data_format",
        "max_source_length",
        "val_max_target_length",
        "max_predict_samples",
    ),
    "answers": (
        "generation_mode",
        "num_beams",
        "generation_batch_tokens",
        "seed",
        "engine",
        "vllm_url",
        "vllm_key",
        "prefix_store",
    ),
    "scores": ("baseline", "baseline_from", "probe"),
    "output": ("output_dir", "overwrite_output_dir"),
}

# Shorter than transformers' own, and about this job.
_TEXTS = {
    "learning_rate": "Default: the method's (a prefix: 2e-2, a LoRA: 1e-3, all weights: 1e-4).",
    "gradient_accumulation_steps": "Batches a step: rows a step = batch size × accumulation × processes.",
    "max_steps": "Steps of training, instead of --num_train_epochs.",
    "num_train_epochs": "Times the training file is gone through; default: 3.",
    "gradient_checkpointing": "Less memory, about a third slower; default: where the estimate says that it is needed.",
    "deepspeed": "DeepSpeed's JSON file, e.g. configs/zero3.json.",
    "save_steps": "A checkpoint every N steps; default: 500.",
    "resume_from_checkpoint": "OUTPUT_DIR/checkpoint-N: go on with that run, exactly.",
    "do_predict": "Answer the test file after training, and score the answers.",
    "seed": "Of everything random; default: 42.",
}
_WIDTH = 110


class _Formatter(argparse.HelpFormatter):
    """Each option in one spelling, though argparse also takes it with hyphens."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if action.nargs == 0:
            return name
        values = "|".join(map(str, action.choices)) if action.choices and len(tuple(action.choices)) < 6 else ""
        return f"{name} {values or _metavar(action)}{' …' if action.nargs in ('+', '*') else ''}"


def _metavar(action: argparse.Action) -> str:
    kind = getattr(action.type, "__name__", "")
    if kind == "str" and action.dest.endswith(("_file", "_dir", "_checkpoint", "deepspeed", "_path", "_from")):
        return "PATH"
    return {"int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, "TEXT")


def help_text(
    parser: argparse.ArgumentParser, usage: str, groups: Mapping[str, Sequence[str]] | None, help_all: str
) -> str:
    """The text of --help.

    Args:
        parser: declares the options.
        usage: the first line.
        groups: title → options; None: all of them.
        help_all: the command that shows all.
    """
    formatter = _Formatter(parser.prog)
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            actions.setdefault(action.dest, action)  # the second of a kind is its --no_ form
    for name, text in _TEXTS.items() if groups is not None else ():
        actions[name].help = text
    shown = groups if groups is not None else {"all options": list(actions)}
    for title, names in shown.items():
        formatter.start_section(title)
        formatter.add_arguments([actions[name] for name in names])
        formatter.end_section()
    more = "" if groups is None else f"\n{len(actions)} options in all: {help_all}\n"
    return f"usage: {usage}\n\n{formatter.format_help()}{more}"
