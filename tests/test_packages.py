"""What works without the packages of the extras, and what is said where one is needed."""

import os
import subprocess
import sys

import pytest

from ptuning.errors import ConfigError
from ptuning.packages import require
from tests.conftest import REPO

OPTIONAL = (
    "deepspeed",
    "fastapi",
    "uvicorn",
    "starlette",
    "pydantic",
    "prometheus_client",
    "streamlit",
    "httpx",
    "peft",
    "bitsandbytes",
)


def test_the_one_line():
    require("--x", "json", "json")
    with pytest.raises(ConfigError) as error:
        require("--deepspeed", "no_such_module", "ptuning[full]", instead="leave it out")
    assert (
        str(error.value) == "--deepspeed: no_such_module is not installed; pip install 'ptuning[full]', or leave it out"
    )
    with pytest.raises(ConfigError, match=r"^--optim x: torch-y is not installed; pip install torch-y$"):
        require("--optim x", "no_such_module", "torch-y")


def test_all_that_needs_no_extra_runs_without_one(tmp_path):
    """One process, because importing torch takes most of the time. In the end all but the page's packages are there."""
    said = run_without(
        """
import contextlib, io
from ptuning.cli import main
from ptuning.methods.prefix.export import export_peft
for command in ("train", "evaluate", "validate-data", "compare", "report", "serve", "chat", "export", "convert", "estimate"):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert "usage" in text.getvalue().lower(), command
for line in LINES:
    print("exit", main(line.split()))
try:
    export_peft(None, None, "x")
except Exception as error:
    print("error:", error)
for name in HIDDEN:
    if name != "streamlit":
        del sys.modules[name]
print("exit", main(["serve", "--model", "x"]))
""",
        [
            "serve",
            "train --model_name_or_path x --train_file x --output_dir x --deepspeed zero3.json",
            "train --model_name_or_path x --output_dir x --quantization nf4",
            "convert --checkpoint x",
            "export --checkpoint x --output_dir x",
        ],
        tmp_path,
    )
    assert said.splitlines() == [
        "error: ptuning serve: fastapi is not installed; pip install 'ptuning[serve]'",
        "exit 2",
        "error: --deepspeed: deepspeed is not installed; pip install 'ptuning[full]', or leave --deepspeed out and start with "
        "torchrun, which keeps all weights on every GPU",
        "exit 2",
        "error: --quantization nf4: bitsandbytes is not installed; pip install 'ptuning[bnb]', or give --quantization_bit 4",
        "exit 2",
        "error: a DeepSpeed checkpoint: deepspeed is not installed; pip install 'ptuning[full]'",
        "exit 2",
        "error: a DeepSpeed checkpoint: deepspeed is not installed; pip install 'ptuning[full]'",
        "exit 2",
        "error: --format peft: peft is not installed; pip install 'ptuning[peft]'",
        "error: the page: streamlit is not installed; pip install 'ptuning[page]', or leave the page out: --no_page",
        "exit 2",
    ]


def run_without(code: str, lines: list[str], folder) -> str:
    """What a program says in which the packages can't be imported; stdout and stderr together, without warnings."""
    hidden = f"import sys\nHIDDEN, LINES = {OPTIONAL!r}, {lines!r}\nsys.modules |= dict.fromkeys(HIDDEN)\n"
    command = [sys.executable, "-W", "ignore", "-c", hidden + code]
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
