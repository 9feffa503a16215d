"""A dataclass's fields as the options of a command."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ptuning.config.commands import option, parse_options
from ptuning.errors import ConfigError


def pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise ConfigError(f"{text}: expected NAME=VALUE")
    return name, value


@dataclass(frozen=True)
class Options:
    output: Path = field(metadata={"help": "folder"})
    files: tuple[str, ...] = option((), "data files", positional=True)
    rows: int | None = option(None, "at most, 100% by default", aliases=("--max_rows", "-n"))
    rate: float = 0.5
    quiet: bool = False
    kind: Literal["a", "b"] = "a"
    size: str = field(default="small", metadata={"choices": ["small", "large"]})
    pairs: tuple[tuple[str, str], ...] | None = field(default=None, metadata={"parse": pair})
    numbers: list[int] = field(default_factory=list)
    key: str | None = field(default=None, metadata={"env": "TEST_COMMANDS_KEY"})

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"--rate is {self.rate}; the least is 0")


def parse(line: str) -> Options:
    return parse_options(Options, line.split(), "ptuning test", "What it does.")


def test_what_is_not_given_is_the_dataclass_default():
    assert parse("--output x") == Options(Path("x"))


def test_every_kind_of_field():
    options = parse(
        "one two --output=x -n 5 --rate 1e-3 --quiet --kind b --size large --pairs a=1 --pairs b=2 --numbers 3 --numbers 4"
    )
    assert options == Options(Path("x"), ("one", "two"), 5, 1e-3, True, "b", "large", (("a", "1"), ("b", "2")), [3, 4])
    assert parse("--output x --max_rows 7").rows == 7


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--output x --rote 1", r"unknown option --rote; did you mean --rate\? \(all options: ptuning test --help\)"),
        ("--output x --zzzz=1", r"unknown option --zzzz \(all"),
        ("--output x --row 1", "unknown option --row; did you mean --rows"),  # no abbreviations
        ("", "required: --output"),
        ("--output x --rows many", "--rows.*invalid int value: 'many'"),
        ("--output x --kind c", "--kind.*invalid choice: 'c'"),
        ("--output x --size tiny", "--size.*invalid choice: 'tiny'"),
        ("--output x --rate -1", "--rate is -1.0; the least is 0"),
        ("--output x --pairs a", "a: expected NAME=VALUE"),
        ("--output", "--output.*expected one argument"),
    ],
)
def test_what_cannot_be_read(line, text):
    with pytest.raises(ConfigError, match=text):
        parse(line)


def test_a_positional_without_a_default_must_be_there():
    @dataclass
    class One:
        run: str = option(..., "folder", positional=True)
        other: str | None = field(default=None, metadata={"positional": True})

    assert parse_options(One, ["a"], "p") == One("a") and parse_options(One, ["a", "b"], "p") == One("a", "b")
    with pytest.raises(ConfigError, match="required: run"):
        parse_options(One, [], "p")
    with pytest.raises(ConfigError, match="unrecognized arguments: c"):
        parse_options(One, ["a", "b", "c"], "p")


def test_the_environment_stands_in(monkeypatch):
    monkeypatch.setenv("TEST_COMMANDS_KEY", "secret")
    assert parse("--output x").key == "secret" and parse("--output x --key own").key == "own"
    monkeypatch.setenv("TEST_COMMANDS_KEY", "")
    assert parse("--output x").key is None


def test_help_shows_texts_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("TEST_COMMANDS_KEY", "secret")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for text in (
        "ptuning test",
        "What it does.",
        "data files",
        "at most, 100% by default",
        "(default: 0.5)",
        "--max_rows",
    ):
        assert text in shown
    assert "secret" not in shown and "TEST_COMMANDS_KEY" in shown
