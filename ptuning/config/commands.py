"""Options of a small command: a dataclass declares them, and is what the command gets.

    @dataclass(frozen=True)
    class ServeOptions:
        model: str = option("models/x", "base or tuned model", aliases=("--model_name_or_path",))
        output_dir: str = option(..., "new folder; must be given")
        prefix: tuple[str, ...] = option((), "a tuned prefix, repeatable")

A field is `--name VALUE`; a bool is a flag; a tuple or list can be given several times; `X | None` is an X. Metadata:

    help        one line; the default is added to it
    aliases     further option strings
    choices     values that are allowed (Literal[...] does the same)
    positional  no option but a place on the command line; a tuple or list takes all that stand there
    parse       text → value, instead of the type
    together    of a tuple or list: several values may follow the option once
    env         environment variable that stands in for an option that isn't given
"""

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from ptuning.config.names import unknown
from ptuning.errors import ConfigError
from ptuning.language import VARIABLE

Options = TypeVar("Options")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text; `...` as default makes it required."""
    default = dataclasses.MISSING if default is ... else default
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def language_option(of: str) -> Any:
    """--lang, of a `Language | None`."""
    return option(None, f"of the {of}; default: {VARIABLE} in the environment, else the locale")


def same_option(cls: type, name: str, **more: Any) -> Any:
    """A field that another command's options have too.

    Args:
        more: metadata that is this command's.
    """
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return dataclasses.field(default=field.default, metadata={**field.metadata, **more})


def require_address(name: str, address: str, example: str) -> None:
    """Raises ConfigError where an option's value is no address of HTTP."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--{name} {address}: expected an address such as {example}")


def parse_options(cls: type[Options], argv: Sequence[str], prog: str, description: str | None = None) -> Options:
    """Reads a command line.

    Args:
        cls: a dataclass; its __post_init__ may check values and combinations.
        argv: without the program's name.
        prog: how the command is called, e.g. `ptuning serve`.
        description: what stands above the options in --help.

    Raises:
        ConfigError: an unknown option (with the nearest one), a value of the wrong type, or a required one that is missing.
        SystemExit: --help was printed.
    """
    parser = option_parser_of(cls, prog, description)
    _check_names(argv, parser)
    return _made(cls, parser.parse_args(list(argv)))


def parse_known_options(
    cls: type[Options], argv: Sequence[str], prog: str, description: str | None = None
) -> tuple[Options, list[str]]:
    """As `parse_options`, for a command that takes another one's options too.

    Returns:
        The options, and what of the command line isn't among them.
    """
    given, rest = option_parser_of(cls, prog, description).parse_known_args(list(argv))
    return _made(cls, given), rest


def option_parser_of(cls: type, prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command's options; arguments as `parse_options`."""
    parser, hints = _Parser(prog=prog, description=description, allow_abbrev=False), typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.init:
            _add(parser, item, hints[item.name])
    return parser


def _made(cls: type[Options], given: argparse.Namespace) -> Options:
    hints = typing.get_type_hints(cls)
    values = vars(given).items()
    return cls(**{name: tuple(value) if _container(hints[name]) is tuple else value for name, value in values})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (all options: {self.prog} --help)")


def _add(parser: argparse.ArgumentParser, item: dataclasses.Field, hint: Any) -> None:
    about, plain = item.metadata, _without_none(hint)
    is_several = _container(hint) is not None
    kind = typing.get_args(plain)[0] if is_several else plain
    required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    # An option that isn't given stays out of the result, so that the dataclass's own default holds.
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(item)}
    if kind is bool:
        settings |= {"action": "store_true"}
    else:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else about.get("choices")
        settings |= {"type": about.get("parse") or (type(choices[0]) if choices else kind), "choices": choices}
    environment = os.environ.get(about["env"]) if "env" in about else None
    if environment:
        settings["default"], required = environment, False
    if about.get("positional"):
        nargs = ("+" if required else "*") if is_several else (None if required else "?")
        parser.add_argument(item.name, nargs=nargs, **settings)
        return
    if is_several:
        settings |= {"action": "extend", "nargs": "+"} if about.get("together") else {"action": "append"}
    parser.add_argument(f"--{item.name}", *about.get("aliases", ()), dest=item.name, required=required, **settings)


def _help(item: dataclasses.Field) -> str:
    text = item.metadata.get("help", "").replace("%", "%%")
    notes = []
    if item.default not in (dataclasses.MISSING, None, False, "", ()):
        notes.append(f"default: {item.default}".replace("%", "%%"))
    if "env" in item.metadata:
        notes.append(f"also {item.metadata['env']} in the environment")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _without_none(hint: Any) -> Any:
    """X of `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0]
    return hint


def _container(hint: Any) -> type | None:
    """tuple or list where several values are taken."""
    origin = typing.get_origin(_without_none(hint))
    return origin if origin in (tuple, list) else None


def _check_names(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    known = [option for action in parser._actions for option in action.option_strings]
    for token in argv:
        if token == "--":
            return
        name = token.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise ConfigError(unknown(name, known, f"{parser.prog} --help"))
