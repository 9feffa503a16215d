"""`ptuning completion bash|zsh`: a completion script for the shell, made of the commands' own parsers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import shtab

from ptuning.cli import COMMANDS, load
from ptuning.config.commands import option, option_parser_of, parse_options
from ptuning.config.parse import option_parser


@dataclass(frozen=True)
class CompletionOptions:
    """Of which shell."""

    shell: Literal["bash", "zsh"] = option(..., "the script's language", positional=True)


def completion_command(argv: Sequence[str]) -> None:
    """Prints the script: `source <(ptuning completion bash)`, or write it where the shell looks for such files."""
    options = parse_options(CompletionOptions, argv, "ptuning completion", completion_command.__doc__)
    print(shtab.complete(_parser(), shell=options.shell))


def _parser() -> argparse.ArgumentParser:
    """All commands in one parser; a value is completed with the files that are there."""
    parser = argparse.ArgumentParser(prog="ptuning")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = option_parser_of(load(command.options), name) if command.options else option_parser()
        about = command.about.splitlines()[0]
        added = commands.add_parser(name, parents=[own], add_help=False, help=about.replace("%", "%%"))
        for action in added._actions:  # no public way to an added argument but the value that adding it returned
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's protocol
    return parser
