"""Every option, declared once. Flags and YAML keys are the same names; flags override the file.

The official scripts' flags keep their meaning (THUDM/ChatGLM2-6B `ptuning/arguments.py`), and all of transformers'
TrainingArguments are there. An unknown name is an error that names the nearest valid one.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.chatglm.prefix import DROPOUT
from ptuning.errors import ConfigError

# Flags of the official command lines that have nothing left to do. They run, and one line says why.
WITHOUT_EFFECT = {
    "overwrite_cache": "encoded data is never cached, so nothing old can be read",
    "preprocessing_num_workers": "encoding takes seconds in one process",
}

# Old names of transformers' own options.
RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}


@dataclass
class ModelArguments:
    """Which model, which prefix."""

    model_name_or_path: str = field(metadata={"help": "Official ChatGLM2 directory or hub id."})
    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Prefix to load (ours, official or peft folder): to evaluate it, or with --do_train to start a NEW run "
            "from it (new optimizer and data order; to continue a run use --resume_from_checkpoint)."
        },
    )
    pre_seq_len: int | None = field(
        default=None,
        metadata={"help": "Length of the prefix; without it and without a checkpoint all weights are tuned."},
    )
    prefix_projection: bool = field(default=False, metadata={"help": "Reparametrise the prefix with a two-layer MLP."})
    prefix_dropout: float = field(
        default=DROPOUT, metadata={"help": "Dropout on the prefix keys and values while training; official: 0.1."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the base: auto (fp32 on CPU, bf16 or fp16 on a GPU), float32, …"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), eager, flex_attention or flash_attention_2."}
    )
    quantization_bit: int | None = field(default=None, metadata={"help": "4 or 8; not supported yet."})


@dataclass
class DataArguments:
    """Which data, and how it is cut."""

    train_file: str | None = field(default=None, metadata={"help": "JSON array, JSON lines or CSV."})
    validation_file: str | None = field(
        default=None, metadata={"help": "For the eval loss during training and --do_eval."}
    )
    test_file: str | None = field(default=None, metadata={"help": "For --do_predict; default: the validation file."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the question."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the answer."})
    history_column: str | None = field(default=None, metadata={"help": "Column of past [question, answer] turns."})
    source_prefix: str = field(default="", metadata={"help": "Text put in front of every prompt."})
    loss_on: str = field(
        default="last",
        metadata={
            "help": "last: loss on the answer; all: also on the answers in the history.",
            "choices": ["last", "all"],
        },
    )
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of the prompt, [gMASK] sop included."})
    max_target_length: int = field(
        default=128, metadata={"help": "Tokens of the answer; in prediction, new tokens at most."}
    )
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "max_target_length for evaluation and prediction; default: the same."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every row to the full length, as the official script does; only slower."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    skip_invalid_rows: bool = field(
        default=False, metadata={"help": "Leave rows with problems out instead of stopping."}
    )

    @property
    def eval_target_length(self) -> int:
        return self.val_max_target_length or self.max_target_length

    @property
    def prediction_file(self) -> str | None:
        return self.test_file or self.validation_file


@dataclass
class GenerationArguments:
    """How answers are generated for the scores."""

    predict_with_generate: bool = field(
        default=False, metadata={"help": "Also score generated answers in --do_eval; --do_predict always generates."}
    )
    generation_mode: str = field(
        default="greedy",
        metadata={
            "help": "greedy; or official: the official script's sampling (top_p 0.7, temperature 0.95) and references "
            "cut at max_target_length.",
            "choices": ["greedy", "official"],
        },
    )
    num_beams: int = field(default=1, metadata={"help": "Beam search with this many beams."})
    baseline: bool = field(default=False, metadata={"help": "Score the untuned base on the same rows too."})


@dataclass
class TuningArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for this job."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of this run."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run there."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a lower eval loss; keep the best."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows a device and step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows a device in evaluation."})
    logging_steps: float = field(default=10, metadata={"help": "Log every N steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: a NaN shown as 0 hid broken runs for months."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Where to log: tensorboard, none, …"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows carry their number."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every tuned parameter is used in every step; looking for others only costs time."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length, random or sequential."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.activation_checkpointing_kwargs is None and self.gradient_checkpointing_kwargs is None:
            # The reentrant kind needs an input that requires grad, which a frozen base doesn't have.
            self.activation_checkpointing_kwargs = {"use_reentrant": False}
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from error


@dataclass
class Config:
    """All options of one run."""

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    training: TuningArguments

    def to_dict(self) -> dict:
        """Plain values for the run's record; secrets left out."""
        values = {}
        for group in (self.model, self.data, self.generation):
            values |= {f.name: getattr(group, f.name) for f in fields(group)}
        training = self.training.to_dict()
        return values | {key: value for key, value in sorted(training.items()) if "token" not in key}


def parse(
    argv: list[str],
    infer: Callable[[str], list[str]] = lambda checkpoint: [],
    prepare: Callable[[list[str]], None] = lambda argv: None,
) -> tuple[Config, list[str]]:
    """Command line → config and notes to print.

    Args:
        argv: without the program's name.
        infer: gives the options that a --ptuning_checkpoint implies; any option in argv overrides them.
        prepare: is called with all options before TrainingArguments makes the process group.

    Raises:
        ConfigError: unknown names, wrong types, combinations that can't work.
    """
    argv, notes = _normalise(expand_config(argv))
    if "--ptuning_checkpoint" in argv[:-1]:
        argv = infer(argv[argv.index("--ptuning_checkpoint") + 1]) + argv
    argv += _implied(argv)
    parser = _Parser(
        [ModelArguments, DataArguments, GenerationArguments, TuningArguments], allow_abbrev=False, prog="ptuning"
    )
    _check_names(argv, parser)
    prepare(argv)
    config = Config(*parser.parse_args_into_dataclasses(argv))
    _check(config)
    return config, notes


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ConfigError(message)


def expand_config(argv: list[str]) -> list[str]:
    """`--config x.yaml` becomes the file's options in front, so that what stands on the command line wins."""
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):  # the official `main.py args.json`
        argv = ["--config", argv[0]]
    rest, from_files, index = [], [], 0
    while index < len(argv):
        name, _, value = argv[index].partition("=")
        if name == "--config":
            if not value:
                index += 1
                if index == len(argv):
                    raise ConfigError("--config needs a file, e.g. --config configs/ptuning_demo.yaml")
                value = argv[index]
            from_files += _read_config(Path(value))
        else:
            rest.append(argv[index])
        index += 1
    return from_files + rest


def _read_config(path: Path) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(
            f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: can't be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'option: value' lines, found {type(values).__name__}")
    argv = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        # argparse converts the text, so YAML's own idea of `2e-2` (a string) doesn't matter
        argv += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv


def _normalise(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes out flags without effect, renames old ones, and splits `--a=b`."""
    tokens, notes = [], []
    for token in argv:
        head, eq, tail = token.partition("=")
        tokens += [head, tail] if token.startswith("--") and eq else [token]
    result, skipping = [], False
    for token in tokens:
        if token.startswith("--"):
            name = token[2:].replace("-", "_")
            skipping = name in WITHOUT_EFFECT
            if skipping:
                notes.append(f"--{name} has no effect here: {WITHOUT_EFFECT[name]}")
                continue
            result.append(f"--{RENAMED.get(name, name)}")
        elif not skipping:
            result.append(token)
    return result, notes


def _implied(argv: list[str]) -> list[str]:
    """Options that follow from others, where they aren't given."""
    given = {token for token in argv if token.startswith("--")}
    if "--do_train" not in given:
        return []
    implied = []
    if "--validation_file" in given and "--eval_strategy" not in given:
        # A validation file given to a training run is used: eval loss whenever a checkpoint is due.
        implied += ["--eval_strategy", "steps"]
        if "--eval_steps" not in given:
            last = len(argv) - argv[::-1].index("--save_steps") if "--save_steps" in given else None
            implied += ["--eval_steps", argv[last] if last is not None else "500"]
    if torch.cuda.is_available() and not given & {"--fp16", "--bf16", "--dtype"}:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            implied += ["--fp16", "true"]  # brings the loss scaling that a 16-bit float needs
        elif not given & {"--pre_seq_len", "--ptuning_checkpoint"}:
            implied += ["--bf16", "true"]  # fp32 master weights, bf16 computing; a frozen base is bf16 itself
    return implied


def _check_names(argv: list[str], parser: _Parser) -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    for token in argv:
        if token.startswith("--") and token not in known:
            near = difflib.get_close_matches(token, sorted(known), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown option {token}{hint} (all options: ptuning train --help)")


def _check(config: Config) -> None:
    model, data, training = config.model, config.data, config.training
    if model.quantization_bit is not None:
        raise ConfigError(
            f"--quantization_bit {model.quantization_bit} is not supported yet; leave it out (P-Tuning on the 16-bit base "
            "needs about 14 GB)"
        )
    if not (training.do_train or training.do_eval or training.do_predict):
        raise ConfigError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.output_dir == "trainer_output":
        raise ConfigError("--output_dir is missing; give the folder for this run, e.g. --output_dir output/my-run")
    if not data.prompt_column or not data.response_column:
        missing = "--prompt_column" if not data.prompt_column else "--response_column"
        raise ConfigError(
            f"{missing} is missing; name the column, e.g. --prompt_column content --response_column summary"
        )
    for flag, needed, file in (
        ("--do_train", training.do_train, data.train_file and "--train_file"),
        ("--do_eval", training.do_eval, data.validation_file and "--validation_file"),
        ("--do_predict", training.do_predict, data.prediction_file and "--test_file"),
    ):
        if needed and not file:
            wanted = {"--do_train": "--train_file", "--do_eval": "--validation_file", "--do_predict": "--test_file"}[
                flag
            ]
            raise ConfigError(f"{flag} needs {wanted}")
    if model.pre_seq_len is not None and model.pre_seq_len < 1:
        raise ConfigError(f"--pre_seq_len is {model.pre_seq_len}; use at least 1 (official: 128)")
    if not 0 <= model.prefix_dropout < 1:
        raise ConfigError(f"--prefix_dropout is {model.prefix_dropout}; use 0 up to, not including, 1 (official: 0.1)")
    if model.prefix_projection and model.pre_seq_len is None and model.ptuning_checkpoint is None:
        raise ConfigError("--prefix_projection needs --pre_seq_len")
    if training.logging_nan_inf_filter:
        raise ConfigError("--logging_nan_inf_filter hides NaN losses; leave it off")
    if training.label_smoothing_factor:
        raise ConfigError("--label_smoothing_factor is not supported: the loss is computed only where labels are")
    if training.train_sampling_strategy not in ("group_by_length", "random", "sequential"):
        raise ConfigError(
            f"--train_sampling_strategy {training.train_sampling_strategy} is not supported; use group_by_length, random or "
            "sequential"
        )
    if training.resume_from_checkpoint and model.ptuning_checkpoint:
        raise ConfigError(
            "--resume_from_checkpoint continues a run, --ptuning_checkpoint starts a new one from its prefix; give one"
        )
    if training.early_stopping_patience is not None and not data.validation_file:
        raise ConfigError("--early_stopping_patience needs --validation_file")
    full = model.pre_seq_len is None and model.ptuning_checkpoint is None
    if config.generation.baseline and full and training.do_train and is_deepspeed_zero3_enabled():
        raise ConfigError(
            "--baseline with ZeRO-3 and all weights tuned: the base is gone once training has begun; leave --baseline out and "
            f"score the base by itself: ptuning evaluate --model_name_or_path {model.model_name_or_path} --test_file …"
        )
    if config.generation.num_beams < 1:
        raise ConfigError(f"--num_beams is {config.generation.num_beams}; use at least 1")
