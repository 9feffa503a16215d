"""Answering with a quantised base on a CPU at the shape of ChatGLM2-6B, beside llama.cpp. Prints one JSON line last.

    python benchmarks/cpu_serving.py                        int8, int4 and llama.cpp: 15 GB of disk, 8 GB of memory
    python benchmarks/cpu_serving.py --engines int8 int4    without llama.cpp
    python benchmarks/cpu_serving.py --small                a tiny shape

Random weights are written into --folder (default: a temporary one, deleted at the end). Each engine runs in a process of its own,
one after the other, --rounds times. Our rows are answered with the base and two prefixes in turn. llama.cpp comes from
llama-cpp-python, built in an environment of its own (--llama_venv keeps it). A rate is the median of the steps; `fastest` beside
it tells how busy the machine was. `--clock cpu --threads 1` counts a thread's own seconds of processor time, in which waiting for a
busy machine doesn't count.
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
from pathlib import Path

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
    parser.add_argument("--steps", type=int, default=16, help="timed, of each number of rows")
    parser.add_argument("--prompt_rounds", type=int, default=3)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rounds", type=int, default=2, help="of all engines")
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
        print(json.dumps(worker(args)))
        return
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = args.folder or Path(temporary)
        require_disk(folder, args)
        runs: dict[str, list[dict]] = {engine: [] for engine in args.engines}
        commands = {engine: prepared(engine, folder, Path(temporary), args) for engine in args.engines}
        for _ in range(args.rounds):
            for engine, command in commands.items():
                runs[engine].append(last_line(command, args.threads))
                print(engine, json.dumps(summary(runs[engine][-1:])), flush=True)
    results = {engine: summary(found) for engine, found in runs.items()}
    if LLAMA in results:
        theirs = results[LLAMA]
        for engine in results.keys() - {LLAMA}:
            ours = results[engine]
            ratios = {
                rows: round(ours["rows"][rows]["median"] / theirs["rows"][rows]["median"], 2) for rows in ours["rows"]
            }
            ours["to_llama_cpp"] = ratios | {"prompt": round(ours["prompt"]["median"] / theirs["prompt"]["median"], 2)}
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
    names = ("rows", "prompts", "steps", "prompt_rounds", "threads", "clock")
    options = json.dumps({"shape": shape, **{name: getattr(args, name) for name in names}})
    command = [str(python), str(ROOT / "benchmarks" / "llama_cpp_rate.py"), options, str(folder / "q4_0.gguf")]
    if not (folder / "q4_0.gguf").exists():
        subprocess.run(command, check=True)
    return command


def last_line(command: list[str], threads: int) -> dict:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict]) -> dict:
    """Of the best round each: a busy neighbour makes a round slow, nothing makes it fast."""

    def best(rates: list[list[float]]) -> dict[str, float]:
        chosen = max(rates, key=statistics.median)
        return {"median": round(statistics.median(chosen), 2), "fastest": round(max(map(max, rates)), 2)}

    return {
        "rows": {rows: best([run["rows"][rows] for run in runs]) for rows in runs[0]["rows"]},
        "prompt": best([run["prompt"] for run in runs]),
        **{name: round(runs[-1][name], 2) for name in ("resident_gb", "peak_gb") if name in runs[-1]},
    }


def worker(args: argparse.Namespace) -> dict:
    """Rates of the engine in this process."""
    from ptuning.generation import Engine, GenerationRequest, Prefix
    from ptuning.loading import load_base
    from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
    from ptuning.quantization import choose_kernels
    from ptuning.training.machine import peak_rss

    model = load_base(args.folder / args.worker, dtype="bfloat16", device="cpu")
    choose_kernels(model, args.kernels, lambda line: print(line, file=sys.stderr))
    encoder = PrefixEncoder(PrefixShape.of(model.config), args.pre_seq_len)
    companions = [Prefix.of("one", encoder, model.dtype), Prefix.of("two", encoder, model.dtype), None]
    vocab, result = model.config.vocab_size, {"rows": {}}

    def requests(rows: int, length: int, new: int) -> list[GenerationRequest]:
        ids = [[3 + (row + n) % (vocab - 3) for n in range(length)] for row in range(rows)]
        return [GenerationRequest(row, each, new, prefix=companions[row % 3]) for row, each in enumerate(ids)]

    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def timed(work) -> float:
        started = clock()
        work()
        return clock() - started

    with Engine(model, []) as engine:
        longest, rates = max(args.prompts), []
        for _ in range(args.prompt_rounds + 1):
            engine.add(requests(1, longest, 1)[0])
            rates.append(longest / timed(engine.step))
        result["prompt"] = rates[1:]
        for rows, length in zip(args.rows, args.prompts, strict=True):
            for request in requests(rows, length, args.steps + 2):
                engine.add(request)
            while len(engine.rows) < rows:
                engine.step()
            engine.step()  # warms up
            result["rows"][rows] = [rows / timed(engine.step) for _ in range(args.steps)]
            while engine.has_work:
                engine.step()
        result["resident_gb"] = resident() / 1e9
    result["peak_gb"] = peak_rss() / 1e9
    return result


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
