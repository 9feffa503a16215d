"""The installed command: `ptuning train | evaluate | validate-data | compare | report | serve | chat | export | …`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ptuning import distributed
from ptuning import main as entry
from ptuning.checkpoint.base import read_base_config, resolve_base
from ptuning.checkpoint.zero_files import convert_to_universal, merge_zero
from ptuning.config.commands import option, parse_options
from ptuning.errors import ConfigError, PTuningError
from ptuning.evaluation.compare import compare_command
from ptuning.families import read_config
from ptuning.loading import resolve_dtype
from ptuning.methods.prefix.export import export_official, export_peft
from ptuning.methods.prefix.read import read_prefix
from ptuning.report import report_command
from ptuning.serving.chat import base_of, chat
from ptuning.serving.command import serve_command
from ptuning.training.estimate import estimate_command
from ptuning.validation.command import validate_command

CPU = torch.device("cpu")

USAGE = """usage: ptuning COMMAND [options]

  train          tune a prefix or all weights; the options of ptuning/main.py, e.g. --config configs/ptuning_demo.yaml
  evaluate       answer a test file with a tuned prefix and score the answers: --ptuning_checkpoint DIR --test_file FILE …
  validate-data  check data files, report lengths and duplicates, write clean rows: FILE …
  compare        two runs, or a run and its base, on the same rows: is the difference more than noise? RUN_A [RUN_B]
  report         render a run's report.html again, or one page over several runs: RUN …
  serve          REST, OpenAI's format and a web page, many prefixes on one base: --model DIR --prefix NAME=DIR …
  chat           talk to a model in the terminal: --ptuning_checkpoint DIR
  export         write a prefix for other programs: --ptuning_checkpoint DIR --format official|peft --output_dir DIR
                 or merge a DeepSpeed ZeRO checkpoint into a model folder: --checkpoint DIR --output_dir DIR
  estimate       memory and disk that a training run needs, against what is there; the options of train, and --num_gpus N
  convert        make a DeepSpeed checkpoint resumable on another number of processes: --checkpoint DIR

ptuning COMMAND --help lists the options."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": lambda rest: entry.main(["--do_train", *rest]),
        "evaluate": lambda rest: entry.main(["--do_predict", *rest]),
        "validate-data": validate_command,
        "compare": compare_command,
        "report": report_command,
        "chat": chat,
        "export": export,
        "convert": convert,
        "estimate": estimate_command,
        "serve": serve_command,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"error: no command {argv[0]!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:]) or 0
    except PTuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class ExportOptions:
    """What to write, and for whom."""

    output_dir: str = option(..., "new folder")
    ptuning_checkpoint: str | None = option(None, "a prefix")
    checkpoint: str | None = option(None, "checkpoint-N of a full-parameter run with --deepspeed; no GPU needed")
    format: Literal["official", "peft"] | None = option(None, "of a prefix; a whole model is always official")
    model_name_or_path: str | None = option(
        None, "default: the base that the checkpoint names, or the checkpoint itself"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "of a whole model; default: float32")

    def __post_init__(self):
        if (self.ptuning_checkpoint is None) == (self.checkpoint is None):
            raise ConfigError("give --ptuning_checkpoint (a prefix) or --checkpoint (a ZeRO checkpoint of all weights)")
        if self.checkpoint is not None and self.format == "peft":
            raise ConfigError(
                "--format peft is for prefixes; leave it out, a whole model is written in the official format"
            )
        if self.checkpoint is None and (self.format is None or self.dtype is not None):
            raise ConfigError("a prefix needs --format official or peft, and no --dtype: it is always float32")


def export(argv: list[str]) -> None:
    """Writes a prefix in the official or peft's format, or a ZeRO checkpoint's weights as an official model folder."""
    args = parse_options(ExportOptions, argv, "ptuning export")
    if args.checkpoint is not None:
        base = None if args.model_name_or_path is None else resolve_base(args.model_name_or_path)
        folder = merge_zero(args.checkpoint, args.output_dir, base, resolve_dtype(args.dtype or "float32", CPU))
        print(f"Wrote {folder} in official format, {args.dtype or 'float32'}")
        return
    assert args.ptuning_checkpoint is not None  # one of the two is given
    checkpoint = read_prefix(args.ptuning_checkpoint)
    base = resolve_base(base_of(args.model_name_or_path, args.ptuning_checkpoint))
    read_base_config(base)  # refuses other architectures
    if args.format == "official":
        folder = export_official(checkpoint, read_config(base), args.output_dir)
    else:
        folder = export_peft(checkpoint, read_config(base), args.output_dir, str(base))
    print(f"Wrote {folder} in {args.format} format")


@dataclass(frozen=True)
class ConvertOptions:
    """Which checkpoint."""

    checkpoint: str = option(..., "checkpoint-N of a run with --deepspeed")


def convert(argv: list[str]) -> None:
    """Adds DeepSpeed's universal files to a checkpoint, which any number of processes can resume from."""
    args = parse_options(ConvertOptions, argv, "ptuning convert")
    distributed.choose_deepspeed_device()
    folder = convert_to_universal(args.checkpoint)
    print(f"Wrote {folder}. Resume with --resume_from_checkpoint {args.checkpoint} and the same effective batch")


if __name__ == "__main__":
    sys.exit(main())
