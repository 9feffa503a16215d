"""The command's own words: overview, version, suggestions, what is imported for them, completion."""

import subprocess
import sys

import pytest

import ptuning
from ptuning.cli import COMMANDS, load, main

LIGHT = """
import sys
from ptuning.cli import main
assert main(["--help"]) == 0 and main(["--version"]) == 0
print("heavy:", [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


def test_the_overview_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert all(f"\n  {name}" in done.stdout for name in COMMANDS)
    assert f"ptuning {ptuning.__version__} (torch 2." in done.stdout


@pytest.mark.parametrize("argv", [["help"], ["-h"], ["--help"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: ptuning COMMAND")


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("chatt", "chat")])
def test_a_slip_is_answered_with_the_command_that_was_meant(typed, meant, capsys):
    assert main([typed]) == 2
    assert (
        f"no command {typed!r}; did you mean {meant}? (there are train, evaluate, predict," in capsys.readouterr().err
    )


def test_nothing_typed_is_an_error(capsys):
    assert main([]) == 2 and "usage" in capsys.readouterr().out


def test_every_command_is_there():
    for command in COMMANDS.values():
        assert callable(load(command.function))
        assert not command.options or load(command.options).__dataclass_fields__


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["help", "predict"])
    assert ended.value.code == 0 and "--generation_mode" in capsys.readouterr().out


def test_completion_knows_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "validate-data" in script and "--ptuning_checkpoint" in script and "--pre_seq_len" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err


def test_load_model_is_found_when_asked_for():
    assert ptuning.load_model.__module__ == "ptuning.loading"
    with pytest.raises(AttributeError, match="no attribute 'load_modell'"):
        ptuning.load_modell  # noqa: B018
