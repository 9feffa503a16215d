"""What a run says at its end can be typed as it stands, whatever the folders are called."""

import shlex

import pytest

from ptuning.methods import FullMethod, PrefixMethod

BASE, FOLDER = "/models/my base's", "out put/$run; rm *"
PREFIX = [["--ptuning_checkpoint", FOLDER], ["--model", BASE, "--prefix", f"{'$run; rm *'}={FOLDER}"]]
FULL = [["--model_name_or_path", FOLDER], ["--model", FOLDER]]


@pytest.mark.parametrize(("method", "options"), [(PrefixMethod(8), PREFIX), (FullMethod(), FULL)])
def test_commands_are_shell_words(monkeypatch, method, options):
    monkeypatch.setattr("sys.executable", "/a place/bin/python")
    chat, serve = (shlex.split(line) for line in method.next_commands(BASE, FOLDER))
    assert chat == ["Next:", "/a place/bin/ptuning", "chat", *options[0]]
    assert serve == ["/a place/bin/ptuning", "serve", *options[1]]
