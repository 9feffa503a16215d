"""Command line and YAML → Config. An unknown name is an error that says what to use instead."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from ptuning.config import shipped
from ptuning.config.checks import check
from ptuning.config.help import EVALUATION, TRAINING, help_text
from ptuning.config.names import OLD_VALUES, RENAMED, WHY_WITHOUT, WITHOUT_EFFECT, unknown
from ptuning.config.options import Config, DataArguments, GenerationArguments, ModelArguments, TuningArguments
from ptuning.config.ranges import check_ranges
from ptuning.errors import ConfigError
from ptuning.messages import message


def parse(
    argv: list[str],
    infer: Callable[[str], list[str]] = lambda checkpoint: [],
    prepare: Callable[[list[str]], None] = lambda argv: None,
    defaults: Callable[[str, bool], dict[str, object]] = lambda method, continues: {},
) -> tuple[Config, list[str]]:
    """Command line → config and notes to print.

    Args:
        argv: without the program's name.
        infer: gives the options that a --ptuning_checkpoint implies; any option in argv overrides them.
        prepare: is called with all options before TrainingArguments makes the process group.
        defaults: gives the options that a method brings where they aren't given; whether it goes on from a checkpoint, which
            has settings of its own.

    Raises:
        ConfigError: unknown names, wrong types, combinations that can't work.
        SystemExit: --help was printed.
    """
    _answer_help(argv)
    argv, notes = _normalise(expand_config(argv))
    if "--ptuning_checkpoint" in argv[:-1]:
        argv = infer(argv[argv.index("--ptuning_checkpoint") + 1]) + argv
    argv, notes = _with_method(argv, notes, defaults)
    argv += _implied(argv)
    parser = option_parser()
    _check_names(argv, parser)
    check_ranges(argv)
    prepare(argv)
    *groups, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        raise ConfigError(
            f"{rest[0]!r} belongs to no option; a value with spaces needs quotes, an option starts with two plain hyphens "
            "(--name value)"
        )
    config = Config(*groups)
    check(config, argv)
    return config, notes


def option_parser() -> HfArgumentParser:
    """Of all options of a run."""
    groups = [ModelArguments, DataArguments, GenerationArguments, TuningArguments]
    return _Parser(groups, allow_abbrev=False, prog="ptuning")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ConfigError(message)


def with_config(argv: list[str]) -> list[str]:
    """`x.yaml …`, as the official `main.py args.json` and other toolkits have it, is `--config x.yaml …`."""
    return ["--config", *argv] if argv and argv[0].endswith((".json", ".yaml", ".yml")) else argv


def expand_config(argv: list[str]) -> list[str]:
    """`--config x.yaml` becomes the file's options in front, so that what stands on the command line wins."""
    argv = with_config(argv)
    rest, from_files, index = [], [], 0
    while index < len(argv):
        name, _, value = argv[index].partition("=")
        if name == "--config":
            if not value:
                index += 1
                if index == len(argv):
                    raise ConfigError("--config needs a file, e.g. --config configs/ptuning_demo.yaml")
                value = argv[index]
            from_files += _read_config(Path(shipped.find(value)))
        else:
            rest.append(argv[index])
        index += 1
    return from_files + rest


def _read_config(path: Path) -> list[str]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OptionLoader)
    except FileNotFoundError:
        raise ConfigError(shipped.no_such_file(path)) from None
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
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise ConfigError(f"{path}: {key} is a list of lists; write its values in one list")
        # argparse converts the text, so YAML's own idea of `2e-2` (a string) doesn't matter
        argv += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv


class _OptionLoader(yaml.SafeLoader):
    """YAML without what makes a file say something else than it seems to: a key twice, a value by reference."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"*{event.anchor} refers to another value; write the value itself",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _normalise(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes out flags without effect, renames old ones, and splits `--a=b`."""
    tokens = []
    for token in argv:
        head, eq, tail = token.partition("=")
        tokens += [head, tail] if token.startswith("--") and eq else [token]
    result, notes, skipping = [], [], False
    for index, token in enumerate(tokens):
        if token.startswith("--"):
            name = token[2:].replace("-", "_")
            value = tokens[index + 1].lower() if index + 1 < len(tokens) and tokens[index + 1][:2] != "--" else ""
            values = WITHOUT_EFFECT.get(name)
            skipping = values is not None and (not values or value in values)
            if skipping:
                notes.append(message("no_effect", name=name, why=WHY_WITHOUT(name)))
                continue
            result.append(f"--{RENAMED.get(name, name)}")
        elif not skipping:
            result.append(token)
    return result, notes


def _with_method(
    argv: list[str], notes: list[str], defaults: Callable[[str, bool], dict[str, object]]
) -> tuple[list[str], list[str]]:
    """Decides what a training run tunes, and what follows from that."""
    given = {token for token in argv if token.startswith("--")}
    if "--do_train" not in given:
        return argv, notes
    method = _last(argv, "--method")
    if method is None:
        # The shape of the official ds_train_finetune.sh, which names no method.
        full = "--deepspeed" in given and not given & {"--pre_seq_len", "--ptuning_checkpoint"}
        method = "full" if full else "prefix"
        argv = [*argv, "--method", method]
        if full:
            notes = [*notes, message("deepspeed_means_full")]
    for name, value in defaults(method, "--ptuning_checkpoint" in given).items():
        if f"--{name}" not in given:
            argv, notes = (
                [*argv, f"--{name}", str(value)],
                [*notes, message("default_of_method", name=name, value=value, method=method)],
            )
    return argv, notes


def _last(argv: list[str], option: str) -> str | None:
    """The value of an option's last occurrence."""
    places = [index for index, token in enumerate(argv[:-1]) if token == option]
    return argv[places[-1] + 1] if places else None


def _implied(argv: list[str]) -> list[str]:
    """Options that follow from others, where they aren't given."""
    given = {token for token in argv if token.startswith("--")}
    if "--do_train" not in given:
        return []
    implied = []
    wants_best = given & {"--early_stopping_patience", "--metric_for_best_model", "--load_best_model_at_end"}
    validates = "--validation_file" in given or ("--dataset_name" in given and wants_best)
    if validates and "--eval_strategy" not in given:
        # A validation file given to a training run is used: eval loss whenever a checkpoint is due.
        implied += ["--eval_strategy", "steps"]
        if "--eval_steps" not in given:
            implied += ["--eval_steps", _last(argv, "--save_steps") or "500"]
    for of_eval, of_save in (("--eval_steps", "--save_steps"), ("--eval_strategy", "--save_strategy")):
        if wants_best and of_eval in given and of_save not in given:
            # The best evaluation must have its checkpoint.
            implied += [of_save, _last(argv, of_eval) or ""]
    if torch.cuda.is_available() and not given & {"--fp16", "--bf16", "--dtype"}:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            implied += ["--fp16", "true"]  # brings the loss scaling that a 16-bit float needs
        elif _last(argv, "--method") == "full":
            implied += ["--bf16", "true"]  # fp32 master weights, bf16 computing; a frozen base is bf16 itself
    return implied


def _check_names(argv: list[str], parser: _Parser) -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    for token in argv:
        if token.startswith("--") and token not in known:
            raise ConfigError(unknown(token, known, "ptuning train --help_all"))
    for name, value in itertools.pairwise(argv):
        if (instead := OLD_VALUES.get((name.removeprefix("--"), value))) is not None:
            raise ConfigError(f"{name} {value}: transformers has it no more; use {name} {instead}")


def _answer_help(argv: list[str]) -> None:
    """Prints the help that is asked for, and ends."""
    asked = {"-h", "--help", "--help_all", "--help-all"} & set(argv)
    if not asked:
        return
    scores = "--do_predict" in argv and "--do_train" not in argv
    command = "evaluate" if scores else "train"
    usage = "ptuning evaluate [RUN] [--name VALUE …]" if scores else "ptuning train [RUN.yaml] [--name VALUE …]"
    groups = None if any("all" in token for token in asked) else EVALUATION if scores else TRAINING
    print(help_text(option_parser(), usage, groups, f"ptuning {command} --help_all"))
    raise SystemExit(0)
