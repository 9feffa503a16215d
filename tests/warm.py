"""A Python for the tests that has imported everything already: it starts in 0.1 s instead of 5 s.

Most of a short command's time is `import torch, transformers, …`. `start()` runs one server process that imports the
package once, and writes programs that are called like `python`, `torchrun`, …: each call becomes a process of its own,
forked from the server, with the caller's arguments, environment, folder, network namespace and standard files; signals, exit
status and the death of either side are passed on. The pid that the caller knows is not that of the process. An ordinary
Python runs instead where that could make a difference: a variable that libraries read while they are imported, an option
other than -u, a terminal. `PTUNING_TESTS_COLD=1` does so always.

The workers of pytest-xdist start this way too, forked from a second server that has collected the tests as well: their own
collection finds all modules imported.

As a script this file is both: `warm.py --serve FOLDER [TESTS…]` and `warm.py SOCKET [-u] SCRIPT|-m MODULE|-c CODE …`.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path

# Read at import by torch, its kernels, the hub's client, DeepSpeed, or by Python itself.
READ_AT_IMPORT = (
    "ATEN_",
    "CUDA",
    "DS_",
    "GOMP_",
    "HF_",
    "KMP_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "PYTHON",
    "TORCH_",
)
# torchrun's; and which GPUs the launcher names, which is read when the first one is used
NOT_READ = ("PYTHON_EXEC", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_VISIBLE_DEVICES")
NETWORK = "/proc/self/ns/net"
WORKERS = "workers"  # where xdist's Python lies, in the folder of the other programs
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LENGTH = struct.Struct("!I")


def read_at_import(environment) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name not in NOT_READ
    }


# ---- the program that is called like `python` ----


def call(address: str, arguments: list[str]) -> int:
    """Has the server run the arguments; returns the exit status, or becomes an ordinary Python."""
    cold = os.environ.get("PTUNING_TESTS_COLD") or not Path(address).exists()
    if Path(address).parent.name != WORKERS:  # a worker writes to the terminal only what went wrong in pytest
        cold = cold or any(os.isatty(number) for number in range(3))
    plain = [argument for argument in arguments[:1] if argument.startswith("-") and argument not in ("-u", "-m", "-c")]
    if cold or plain or not arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        order = json.dumps(
            {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
        ).encode()
        with open(NETWORK) as network:  # noqa: PTH123
            socket.send_fds(server, [LENGTH.pack(len(order))], [0, 1, 2, network.fileno()])
        server.sendall(order)
        for number in PASSED_ON:
            signal.signal(number, lambda received, _: server.sendall(bytes([received])))
        answer = server.recv(LENGTH.size, socket.MSG_WAITALL)
    if len(answer) < LENGTH.size:
        raise SystemExit("warm: the server of the tests is gone")
    (status,) = LENGTH.unpack(answer)
    if status == 0xFFFF:  # the server can't run this one
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, *arguments])
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


# ---- the server ----


def serve(folder: Path, tests: list[str]) -> None:
    """Imports the package and answers calls until its standard input ends, which is when the tests do.

    What a call starts with `sys.executable`, as torchrun does, is answered by `python` again. If there are tests, a second
    process answers the calls of xdist's workers, which has collected them.
    """
    given = dict(os.environ)
    import torch

    import ptuning.cli
    import ptuning.main  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    if tests and os.fork() == 0:
        (folder / WORKERS / "pid").write_text(str(os.getpid()))
        collect(tests)
        listen(folder / WORKERS / "socket", given)
        os._exit(0)

    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    from ptuning.evaluation.scores import official_scores
    from ptuning.report.page import templates
    from ptuning.report.svg import draw

    # What is read when it is first used: dictionaries, fonts, templates.
    official_scores("你好", "你好")
    draw(lambda axes: axes.plot([1, 2]))
    for name in templates().list_templates():
        if name.endswith(".jinja"):
            templates().get_template(name)
    sys.executable = str(folder / "python")
    listen(folder / "socket", given)


def collect(tests: list[str]) -> None:
    """Collects the tests as a worker will do it again, which leaves their modules imported."""
    import pytest

    printed = os.dup(1)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
    os.environ["PYTEST_XDIST_WORKER"] = WORKERS
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *tests])
    del os.environ["PYTEST_XDIST_WORKER"]
    os.dup2(printed, 1)
    os.close(printed)


def listen(address: Path, given: dict[str, str]) -> None:
    """Answers calls; `given` is the environment before anything was imported."""
    import gc

    added = {name: value for name, value in os.environ.items() if given.get(name) != value}
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen(64)
        Path(f"{address}.new").rename(address)
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            if 0 in ready:
                return
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with contextlib.suppress(BrokenPipeError):
                    answer(connection, given, added)
                os._exit(0)
            connection.close()


def answer(connection: socket.socket, given: dict[str, str], added: dict[str, str]) -> None:
    """Runs one call in a child; passes signals on to it and its exit status back."""
    head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 4)
    order = json.loads(connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL))
    environment = order["environment"]
    if read_at_import(added | environment) != read_at_import(given | added):
        connection.sendall(LENGTH.pack(0xFFFF))
        return
    child = os.fork()
    if child == 0:
        connection.close()
        become(order["arguments"], added | environment, order["folder"], files)
    for number in files:
        os.close(number)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            connection.sendall(LENGTH.pack(os.waitpid(child, 0)[1]))
            return
        received = connection.recv(1)
        os.kill(child, received[0] if received else signal.SIGKILL)
        if not received:  # whoever called was killed
            os.waitpid(child, 0)
            return


def become(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """What `python ARGUMENTS…` does after its start. Doesn't return."""
    import atexit
    import ctypes
    import random
    import runpy
    import threading
    import traceback

    import numpy
    import torch

    # After a fork torch makes its pool of threads anew when it is next needed; two threads that need it at once would fail.
    torch.set_num_threads(1)
    random.seed()  # each process has numbers of its own
    numpy.random.seed()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, which ignores it
    network = files.pop()
    if os.fstat(network).st_ino != Path(NETWORK).stat().st_ino:  # under `ip netns exec`; os.setns is there from 3.12 on
        assert ctypes.CDLL(None, use_errno=True).setns(network, 0) == 0, os.strerror(ctypes.get_errno())
    os.close(network)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    status = 0
    try:
        if arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            namespace = {"__name__": "__main__"}
            exec(compile(arguments[1], "<string>", "exec"), namespace)
        elif arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = None
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if status is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status & 0xFF)


# ---- for the tests ----


@contextlib.contextmanager
def start(folder: Path, tests: tuple[str, ...] = ()):
    """Runs a server and writes the commands `python`, `ptuning`, `torchrun`, … that it runs into the folder.

    Until it answers (`wait`) these are ordinary Pythons. `tests` are what pytest is told to collect; the Python of its workers
    lies in the folder's `workers`.
    """
    import subprocess

    (folder / WORKERS).mkdir(exist_ok=True)
    write(folder / WORKERS / "python", folder / WORKERS / "socket")
    write(folder / "python", folder / "socket")
    for name in ("ptuning", "torchrun", "deepspeed", "accelerate"):
        write(folder / name, folder / "socket", Path(sys.executable).with_name(name))
    if not hasattr(os, "pidfd_open"):  # only Linux has it; elsewhere each call is an ordinary Python
        yield folder
        return
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", folder, *tests],
        stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    (folder / "pid").write_text(str(server.pid))
    try:
        yield folder
    finally:
        server.stdin.close()
        server.wait()


def write(program: Path, *words: Path) -> None:
    """A program that calls a server: its socket, and the script that is run if it isn't the caller who says which."""
    given = " ".join(f'"{word}"' for word in words)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" {given} "$@"\n')
    program.chmod(0o755)


def wait(folder: Path) -> None:
    """Until the server of this folder answers."""
    if not hasattr(os, "pidfd_open"):
        return
    while not (folder / "socket").exists():
        pids = [file.read_text() for file in (folder.parent / "pid", folder / "pid") if file.exists()]
        assert all(map(lives, filter(None, pids))), "the server of warm Pythons didn't start"
        select.select([], [], [], 0.01)


def lives(pid: str) -> bool:
    import psutil

    return psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = str(Path(__file__).resolve().parents[1])
        serve(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
