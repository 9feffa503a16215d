"""Answering with a quantised base on a CPU at the shape of ChatGLM2-6B, beside llama.cpp. Prints one JSON line last.

    python benchmarks/cpu_serving.py                        int8, int4 and llama.cpp: 15 GB of disk, 20 GB of memory
    python benchmarks/cpu_serving.py --engines int8 int4    without llama.cpp
    python benchmarks/cpu_serving.py --small                a tiny shape

Random weights are written into --folder (default: a temporary one, deleted at the end). Each engine is a process of its own; all
are loaded at once (int8 7 GB, int4 5, llama.cpp 7) and take turns, because a machine's memory is half as fast again when its
neighbours are quiet, for minutes. Our rows are answered with the base and two prefixes in turn. llama.cpp comes from
llama-cpp-python, built in an environment of its own (--llama_venv keeps it). A rate is the median of all steps, `to_llama_cpp` the
median of the turns' ratios. `--clock cpu --threads 1` counts a thread's own seconds of processor time, in which waiting for a busy
machine doesn't count.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from common import SIX_B, TINY_SHAPE, write_base

ROOT = Path(__file__).resolve().parents[1]
BITS = {"int8": 8, "int4": 4}
LLAMA = "llama.cpp"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=[*BITS, LLAMA], default=[*BITS, LLAMA])
    parser.add_argument("--kernels", choices=["fast", "exact"], default="fast", help="of ours")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[128, 128, 32], help="tokens of a prompt, for each of --rows"
    )
    parser.add_argument("--turns", type=int, default=6, help="of all engines, for each number of rows and for prompts")
    parser.add_argument("--steps", type=int, default=5, help="timed in a turn")
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--folder", type=Path, help="for the weights; kept")
    parser.add_argument(
        "--llama_venv", type=Path, help="environment with llama-cpp-python and gguf; made if it isn't there, kept"
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", choices=BITS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: threads that wait for each other use processor time")
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        worker(args)
        return
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = args.folder or Path(temporary)
        require_disk(folder, args)
        commands = {engine: prepared(engine, folder, Path(temporary), args) for engine in args.engines}
        with ExitStack() as stack:
            engines = {}
            for engine, command in commands.items():
                errors = stack.enter_context(tempfile.TemporaryFile("w+"))
                engines[engine] = Started(command, args.threads, errors)
                stack.callback(engines[engine].process.kill)
            results = measured(engines, args)
    shape = TINY_SHAPE if args.small else SIX_B
    print(
        json.dumps(
            {
                "benchmark": "cpu_serving",
                **shape,
                "threads": args.threads,
                "clock": args.clock,
                "kernels": args.kernels,
                **results,
            }
        )
    )


def require_disk(folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"int8": 7, "int4": 4, LLAMA: 4}
    needed = 0.1 if args.small else sum(sizes[engine] for engine in args.engines)
    if shutil.disk_usage(folder).free < needed * 1e9:
        raise SystemExit(f"{folder}: needs {needed} GB of disk; give --folder on a larger one, or fewer --engines")


def prepared(engine: str, folder: Path, temporary: Path, args: argparse.Namespace) -> list[str]:
    """Writes an engine's weights where they aren't there. Returns the command that measures it."""
    shape = TINY_SHAPE if args.small else SIX_B
    if engine in BITS:
        base = folder / engine
        if not (base / "config.json").exists():
            write_base(base, shape, BITS[engine])
        return [sys.executable, __file__, *sys.argv[1:], "--worker", engine, "--folder", str(folder)]
    where = args.llama_venv or temporary / "llama"
    python = where / "bin" / "python"
    if not python.exists():
        venv.create(where, with_pip=True)
    install = [str(python), "-m", "pip", "install", "-q", "llama-cpp-python", "gguf"]
    settings = os.environ | {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
    subprocess.run(install, check=True, env=settings)
    columns = max(args.prompts) + args.steps * (args.turns + 1) + 8
    options = {"shape": shape, "rows": max(args.rows), "columns": columns, "threads": args.threads, "clock": args.clock}
    command = [
        str(python),
        str(ROOT / "benchmarks" / "llama_cpp_rate.py"),
        json.dumps(options),
        str(folder / "q4_0.gguf"),
    ]
    if not (folder / "q4_0.gguf").exists():
        subprocess.run(command, check=True)
    return command


class Started:
    """An engine in a process of its own, which waits for orders: a JSON line each, answered by one."""

    def __init__(self, command: list[str], threads: int, errors: TextIO):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self.command, self.errors = command, errors
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=self.errors
        )
        self.ask()

    def ask(self, **order: Any) -> Any:
        """Without an order: waits until it is loaded."""
        if order:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{' '.join(self.command)}\n{self.errors.read()[-3000:]}")
        return json.loads(line)


def measured(engines: dict[str, Started], args: argparse.Namespace) -> dict[str, dict]:
    """Rates of each engine: of prompts, and of each number of rows."""
    rates: dict[str, dict[str, list[list[float]]]] = {name: {} for name in engines}  # of each turn
    settings = {"prompt": {"prompt": max(args.prompts)}}
    settings |= {str(rows): {"steps": args.steps} for rows in args.rows}
    for setting, order in settings.items():
        for engine in engines.values():
            if setting != "prompt":
                length = args.prompts[args.rows.index(int(setting))]
                engine.ask(rows=int(setting), length=length, room=args.steps * (args.turns + 1) + 1)
        for turn in range(args.turns + 1):
            for name, engine in engines.items():
                found = engine.ask(**order)
                if turn:  # the first one warms up
                    rates[name].setdefault(setting, []).append(found)
        print(
            setting, {name: round(statistics.median(chain(*rates[name][setting])), 2) for name in engines}, flush=True
        )
    results = {name: summary(found) | engines[name].ask(end=True) for name, found in rates.items()}
    for name in results.keys() - {LLAMA} if LLAMA in results else ():
        results[name]["to_llama_cpp"] = {
            setting: round(
                statistics.median(statistics.median(ours) / statistics.median(theirs) for ours, theirs in pairs), 2
            )
            for setting in settings
            for pairs in [list(zip(rates[name][setting], rates[LLAMA][setting], strict=True))]
        }
    return results


def summary(rates: dict[str, list[list[float]]]) -> dict:
    def of(turns: list[list[float]]) -> dict[str, float]:
        every = list(chain(*turns))
        return {"median": round(statistics.median(every), 2), "fastest": round(max(every), 2)}

    found = {setting: of(turns) for setting, turns in rates.items()}
    return {"prompt": found.pop("prompt"), "rows": found}


def worker(args: argparse.Namespace) -> None:
    """The engine in this process: follows the orders of `measured`."""
    from ptuning.generation import Engine, GenerationRequest, Prefix
    from ptuning.loading import load_base
    from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
    from ptuning.quantization import choose_kernels
    from ptuning.training.machine import peak_rss

    model = load_base(args.folder / args.worker, dtype="bfloat16", device="cpu")
    choose_kernels(model, args.kernels, lambda line: print(line, file=sys.stderr))
    encoder = PrefixEncoder(PrefixShape.of(model.config), args.pre_seq_len)
    companions = [Prefix.of("one", encoder, model.dtype), Prefix.of("two", encoder, model.dtype), None]
    vocab, clock = model.config.vocab_size, time.process_time if args.clock == "cpu" else time.perf_counter

    def requests(rows: int, length: int, new: int) -> list[GenerationRequest]:
        ids = [[3 + (row + n) % (vocab - 3) for n in range(length)] for row in range(rows)]
        return [GenerationRequest(row, each, new, prefix=companions[row % 3]) for row, each in enumerate(ids)]

    def timed(work) -> float:
        started = clock()
        work()
        return clock() - started

    with Engine(model, []) as engine:
        for order in orders():
            if "prompt" in order:
                engine.add(requests(1, order["prompt"], 1)[0])
                answer: Any = [order["prompt"] / timed(engine.step)]
            elif "rows" in order:
                for row in list(engine.rows):
                    engine.cancel(row.request.id)
                for request in requests(order["rows"], order["length"], order["room"]):
                    engine.add(request)
                while len(engine.rows) < order["rows"]:
                    engine.step()
                answer = []
            elif "steps" in order:
                answer = [len(engine.rows) / timed(engine.step) for _ in range(order["steps"])]
            else:
                answer = {"resident_gb": round(resident() / 1e9, 2), "peak_gb": round(peak_rss() / 1e9, 2)}
            print(json.dumps(answer), flush=True)


def orders() -> Iterator[dict]:
    print("[]", flush=True)  # loaded
    for line in sys.stdin:
        yield json.loads(line)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
