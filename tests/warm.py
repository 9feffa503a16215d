"""A Python for the tests that has imported everything already: it starts in 0.1 s instead of 5 s.

Most of a short command's time is `import torch, transformers, …`. `start()` runs one server process that imports the
package once, and writes programs that are called like `python`, `torchrun`, …: each call becomes a process of its own,
forked from the server, with the caller's arguments, environment, folder and standard files; signals, exit status and the
death of either side are passed on. The pid that the caller knows is not that of the process. An ordinary Python runs instead
where that could make a difference: a variable that libraries read while they are imported, an option other than -u, a
terminal. `PTUNING_TESTS_COLD=1` does so always.

As a script this file is both: `warm.py --serve SOCKET PYTHON` and `warm.py SOCKET [-u] SCRIPT|-m MODULE|-c CODE …`.
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
    cold = cold or any(os.isatty(number) for number in range(3))
    plain = [argument for argument in arguments[:1] if argument.startswith("-") and argument not in ("-u", "-m", "-c")]
    if cold or plain or not arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        order = json.dumps(
            {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
        ).encode()
        socket.send_fds(server, [LENGTH.pack(len(order))], [0, 1, 2])
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


def serve(address: str, python: str) -> None:
    """Imports the package and answers calls until its standard input ends, which is when the tests do.

    What a call starts with `sys.executable`, as torchrun does, is answered by `python` again.
    """
    given = dict(os.environ)
    import gc

    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch

    import ptuning.cli
    import ptuning.main  # noqa: F401
    from ptuning.evaluation.scores import official_scores
    from ptuning.report.page import templates
    from ptuning.report.svg import draw

    # What is read when it is first used: dictionaries, fonts, templates.
    official_scores("你好", "你好")
    draw(lambda axes: axes.plot([1, 2]))
    for name in templates().list_templates():
        if name.endswith(".jinja"):
            templates().get_template(name)
    torch.set_num_threads(1)
    sys.executable = python
    added = {name: value for name, value in os.environ.items() if given.get(name) != value}
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
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
    head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
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
    import runpy
    import threading
    import traceback

    import torch

    # After a fork torch makes its pool of threads anew when it is next needed; two threads that need it at once would fail.
    torch.set_num_threads(1)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, which ignores it
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
def start(folder: Path):
    """Runs a server and writes the commands `python`, `ptuning`, `torchrun`, … that it runs into the folder.

    Until it answers (`wait`) these are ordinary Pythons.
    """
    import subprocess

    address, real = folder / "socket", Path(sys.executable)
    for name in ("python", "ptuning", "torchrun", "deepspeed", "accelerate"):
        script = "" if name == "python" else f'"{real.with_name(name)}" '
        (folder / name).write_text(f'#!/bin/sh\nexec "{real}" -IS "{__file__}" "{address}" {script}"$@"\n')
        (folder / name).chmod(0o755)
    if not hasattr(os, "pidfd_open"):  # only Linux has it; elsewhere each call is an ordinary Python
        yield folder
        return
    server = subprocess.Popen(
        [real, __file__, "--serve", address, folder / "python"],
        stdin=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    (folder / "pid").write_text(str(server.pid))
    try:
        yield folder
    finally:
        server.stdin.close()
        server.wait()


def wait(folder: Path) -> None:
    """Until the server of this folder answers."""
    import psutil

    if not hasattr(os, "pidfd_open"):
        return
    server = psutil.Process(int((folder / "pid").read_text()))
    while not (folder / "socket").exists():
        assert server.status() != psutil.STATUS_ZOMBIE, "the server of warm Pythons didn't start"
        select.select([], [], [], 0.01)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = str(Path(__file__).resolve().parents[1])
        serve(*sys.argv[2:])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
