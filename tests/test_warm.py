"""The Python of the tests that starts fast is a Python: arguments, files, exit status, signals, and the death of either side."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests import warm
from tests.conftest import WARM_BIN


def run(program, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600, **options)


@pytest.fixture
def python(warm_bin):
    return warm_bin / "python"


def test_what_a_script_sees(python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint(sys.argv[1:], sys.path[0], os.getcwd(), os.environ['HERE'], sys.stdin.read())"
    )
    for program in (python, sys.executable):
        done = run(program, script, "a", "--b", cwd=tmp_path, env=os.environ | {"HERE": "now"}, input="given")
        assert done.stdout == f"['a', '--b'] {tmp_path} {tmp_path} now given\n" and done.stderr == ""


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "raise SystemExit('bad')", "1 / 0", "print('fine')"])
def test_how_it_ends(python, code):
    warm, cold = (run(program, "-c", code) for program in (python, sys.executable))
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_it_has_imported_everything_and_an_ordinary_one_hasnt(python):
    code = "import sys; print('ptuning.main' in sys.modules)"
    assert run(python, "-c", code).stdout == "True\n"
    for cold in ({"PTUNING_TESTS_COLD": "1"}, {"OMP_NUM_THREADS": "2"}, {"HF_HOME": "/elsewhere"}):
        assert run(python, "-c", code, env=os.environ | cold).stdout == "False\n"
    assert run(python, "-X", "utf8", "-c", code).stdout == "False\n"


def test_what_it_starts_starts_fast_too(python):
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import sys; print('torch' in sys.modules)\"])"
    )
    assert run(python, "-c", code).stdout == "True\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it(python, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=600)  # ends when the worker has closed its files
    assert process.returncode == -number
    if number != signal.SIGKILL:  # then nobody is left to wait for it
        assert not os.path.exists(f"/proc/{worker}")  # noqa: PTH110


def test_each_has_random_numbers_of_its_own(python):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run(python, "-c", code).stdout.split() for _ in range(2))
    assert len(first) == 2 and first[0] != second[0] and first[1] != second[1]


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="started without xdist's workers: scripts/test.sh has them"
)
@pytest.mark.skipif("PTUNING_TESTS_COLD" in os.environ, reason="PTUNING_TESTS_COLD asks for ordinary Pythons")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no server outside of Linux")
def test_a_worker_is_a_fork_of_the_process_that_has_collected():
    assert "--serve" in psutil.Process(os.getppid()).cmdline()
    assert psutil.Process(int((WARM_BIN / warm.WORKERS / "pid").read_text())) in psutil.Process().parents()
