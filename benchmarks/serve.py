"""Throughput and latency of the server over real HTTP, against one request at a time. Prints one JSON line last.

    python benchmarks/serve.py                                        12 layers, hidden 512, base and two prefixes, on the CPU

Each client asks, reads the streamed answer, thinks for an exponentially distributed time, and asks again, so that arrivals are
Poisson. A third of the clients use the base, the others one of two prefixes. `--engine sequential` is what the official api.py
does: the next request waits until the one before it is answered. Random weights; answers end at --max_tokens.
"by_library": at --compare_at clients, with each library that torch multiplies with; "clients" are with the faster one by the
server's own measurement.

`--vllm_python .venv-vllm/bin/python` measures two engines and nothing else: this package's, and vLLM behind the same server
(scripts/serve_vllm.sh), one after the other with the same clients. On a machine with other work one thread each, with
OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind before the command.

"arrivals", without HTTP: --streams answers are under way when --arriving prompts of --prompt_tokens come at once. The time
between two tokens of a stream before, while these prompts are computed, and after that, when all are answered side by side; and the
seconds until all is done; as the server does it, and with prompts first. `--arrivals_only --clock cpu --threads 1` measures this
alone, in the thread's own seconds of processor time, for a machine that has other work.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import add_model_arguments, model_config, stamp
from ptuning.checkpoint.manifest import describe
from ptuning.distributed import free_port
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.generation import Engine, GenerationRequest
from ptuning.generation.pace import PAUSE, PIECE_TOKENS, Pace
from ptuning.kernels import ONEDNN, fastest_to_answer, products
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix
from ptuning.methods.prefix.checkpoint import save_prefix

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "chatglm2-tiny"
PREFIXES = {"short": 32, "long": 128}
MODELS = ("base", *PREFIXES)  # a client asks one of them
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A server whose measurement at the start has found oneDNN faster, whatever this machine is.
BY_ONEDNN = """
import sys
import ptuning.kernels
sys.modules["ptuning.kernels.swap"].fastest_to_answer = lambda: "onednn"
from ptuning.cli import main
sys.exit(main())
"""
WORDS = ("上衣", "裤子", "裙子", "外套", "材质", "颜色", "风格", "图案", "简约", "白色", "牛仔", "显瘦", "宽松", "百搭")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--compare_at", type=int, default=16, help="clients of the comparison with --engine sequential")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--think", type=float, default=0.2, help="mean seconds between an answer and the next question")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--stream_tokens", type=int, default=600)
    parser.add_argument("--arriving", type=int, default=20)
    parser.add_argument("--prompt_tokens", type=int, default=1400)
    parser.add_argument("--arrivals_only", action="store_true", help="without the servers")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="of the arrivals")
    parser.add_argument("--threads", type=int, help="of torch, for the arrivals")
    parser.add_argument(
        "--vllm_python", type=Path, help="of an environment with vLLM: only our engine and vLLM, compared"
    )
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: threads that wait for each other use processor time")
    if args.vllm_python and not args.vllm_python.is_file():
        parser.error(
            f"--vllm_python {args.vllm_python}: no such file; bash scripts/setup_vllm.sh makes .venv-vllm/bin/python"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    args.vocab = 2048  # the small tokenizer's
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), args)
        base, prefixes = Path(folder) / "base", {name: Path(folder) / name for name in PREFIXES}
        if args.vllm_python:
            del model
            print(json.dumps(stamp("serve") | about(args) | {"engines": two_engines(base, prefixes, args)}))
            return
        arrived = {name: arrivals(model, args, pause) for name, pause in (("served", PAUSE), ("prompts_first", None))}
        del model
        if args.arrivals_only:
            print(json.dumps({"benchmark": "serve", "clock": args.clock, "arrivals": arrived}))
            return
        chosen = fastest_to_answer()  # as the server would measure it
        with server(base, prefixes, "continuous", max(args.clients), chosen) as (url, process):
            results = measure_all(url, args)
            memory = resident(process.pid)
        by_library = {chosen: results[str(args.compare_at)]} if str(args.compare_at) in results else {}
        for library in products():
            if library in by_library:
                continue
            with server(base, prefixes, "continuous", args.compare_at, library) as (url, _):
                measure(url, args, 1, requests=1)
                by_library[library] = measure(url, args, args.compare_at, args.requests)
        with server(base, prefixes, "sequential", args.compare_at) as (url, _):
            measure(url, args, 1, requests=1)
            sequential = measure(url, args, args.compare_at, max(args.requests - 1, 1))
    print(
        "vLLM on the same load isn't measured: --vllm_python PYTHON, of an environment that scripts/setup_vllm.sh makes"
    )
    ours = results.get(str(args.compare_at))
    summary = about(args) | {
        "benchmark": "serve",
        "rss_mb": memory,
        "clients": results,
        "by_library": by_library,
        "sequential": {str(args.compare_at): sequential},
        "arrivals": arrived,
        "speedup": ours and round(ours["tokens_per_s"] / sequential["tokens_per_s"], 2),
    }
    print(json.dumps(summary))


def about(args: argparse.Namespace) -> dict[str, float]:
    """What the figures are of."""
    return {
        "layers": args.layers,
        "hidden": args.hidden,
        "max_tokens": args.max_tokens,
        "think_s": args.think,
        "threads": torch.get_num_threads(),
    }


def two_engines(base: Path, prefixes: Mapping[str, Path], args: argparse.Namespace) -> dict[str, dict]:
    """This package's engine, then vLLM behind the same server: seconds until it answers, memory, and a figure for each number of
    clients."""
    found, rows = {}, max(args.clients)
    engines = {
        "ptuning": server(base, prefixes, "continuous", rows),
        "vllm": vllm(base, prefixes, args.vllm_python, rows),
    }
    for name, engine in engines.items():
        started = time.perf_counter()
        with engine as (url, process):
            seconds = round(time.perf_counter() - started, 1)
            clients = measure_all(url, args)
            found[name] = {"start_s": seconds, "rss_mb": resident(process.pid), "clients": clients}
    return found


def measure_all(url: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of each number of clients."""
    measure(url, args, 1, requests=1)  # warms up
    return {str(clients): measure(url, args, clients, args.requests) for clients in args.clients}


def make_base(folder: Path, args: argparse.Namespace) -> ChatGLMForConditionalGeneration:
    """Writes a base with random weights and the small model's tokenizer."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(model_config(args)).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return model


def arrivals(model: ChatGLMForConditionalGeneration, args: argparse.Namespace, pause: float | None) -> dict[str, float]:
    """Gaps of streams before and while many prompts are computed, and after that, when all are answered side by side; and the
    seconds from their arrival to the last answer."""
    draw, latest, gaps = random.Random(0), {}, {"before": [], "while": [], "after": []}
    clock = CLOCKS[args.clock]

    def request(name: str, tokens: int, new: int) -> GenerationRequest:
        return GenerationRequest(name, [draw.randrange(3, args.vocab) for _ in range(tokens)], new)

    names = {f"new {number}" for number in range(args.arriving)}
    with Engine(model, [], batch_tokens=1 << 20, pause=pause) as engine:
        engine.pace = Pace(PIECE_TOKENS, pause, clock)
        for number in range(args.streams):
            engine.add(request(f"stream {number}", 60, args.stream_tokens))
        began, started = 0.0, 0.0
        for step in range(10**9):
            if step == 60:
                started = clock()
                for name in sorted(names):
                    engine.add(request(name, args.prompt_tokens, args.max_tokens))
            if not engine.has_work:
                break
            for token in engine.step():
                now = clock()
                if token.id in names:
                    began = (
                        now if token.id not in latest else began
                    )  # in the end, when the last of them had its first token
                elif token.id in latest and step >= 40:
                    waited = latest[token.id] < began or not names <= latest.keys()
                    gaps["before" if step < 60 else "while" if waited else "after"].append(now - latest[token.id])
                latest[token.id] = now
        seconds = clock() - started
    result = {"seconds": round(seconds, 2)}
    for phase, values in gaps.items():
        for q in (50, 99):
            result[f"{phase}_ms_p{q}"] = round(float(np.percentile(values or [0], q)) * 1000, 1)
        result[f"{phase}_ms_largest"] = round(max(values, default=0) * 1000, 1)
    return result


def make_model(folder: Path, args: argparse.Namespace) -> ChatGLMForConditionalGeneration:
    """A base, and prefixes of two lengths. Returns the bare base."""
    base = folder / "base"
    model = make_base(base, args)
    for name, length in PREFIXES.items():
        encoder = attach_prefix(model, length)
        settings = {"pre_seq_len": length, "prefix_projection": False}
        save_prefix(folder / name, encoder, describe(base, "prefix", settings, max_target_length=args.max_tokens))
        detach_prefix(model)
    return model


@contextlib.contextmanager
def server(
    base: Path, tuned: Mapping[str, Path], engine: str, rows: int, library: str | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real server process with what was tuned, by name, beside the base; yields its address when it answers.

    Args:
        library: that multiplies; default: the server's own choice.
    """
    start = ["-c", BY_ONEDNN] if library == ONEDNN else ["-m", "ptuning.cli"]
    command = [sys.executable, *start, "serve", "--model", str(base), "--engine", engine]
    command += ["--kernels", "plain"] if library not in (ONEDNN, None) else []
    with answering(command, tuned, rows, {}) as made:
        yield made


@contextlib.contextmanager
def vllm(base: Path, tuned: Mapping[str, Path], python: Path, rows: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """The same with vLLM computing, started as users start it.

    Args:
        python: of vLLM's environment.
    """
    settings = {"VLLM_PYTHON": str(python.absolute()), "MODEL": str(base), "STORE": str(base.parent / "vllm")}
    command = ["bash", str(ROOT / "scripts" / "serve_vllm.sh")]
    with answering(command, tuned, rows, settings | {"VLLM_PORT": str(free_port())}) as made:
        yield made


@contextlib.contextmanager
def answering(
    command: list[str], tuned: Mapping[str, Path], rows: int, settings: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The process of a command of ours that serves, from its first answer on.

    Args:
        settings: of its environment.

    Raises:
        SystemExit: it ends, or answers nothing for ten minutes.
    """
    port = free_port()
    command += ["--no_page", "--port", str(port), "--max_concurrent", str(rows), "--max_queue", "1000"]
    for name, folder in tuned.items():
        command += ["--prefix", f"{name}={folder}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-2000:]
                    raise SystemExit(
                        f"the server did not start (exit status {process.poll()}): {' '.join(command)}\n{said}"
                    )
                time.sleep(0.1)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def measure(
    url: str, args: argparse.Namespace, clients: int, requests: int, models: Sequence[str] = MODELS
) -> dict[str, float]:
    """Figures of so many clients at a time, each of which asks one of the models."""
    return asyncio.run(_measure(url, args, clients, requests, models))


async def _measure(
    url: str, args: argparse.Namespace, clients: int, requests: int, models: Sequence[str]
) -> dict[str, float]:
    first, between, tokens = [], [], []
    limits = httpx.Limits(max_connections=clients)
    with tqdm(total=clients * requests, desc=f"{clients} clients", unit="answer") as bar:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

            async def client(number: int) -> None:
                draw = random.Random(number)
                for _ in range(requests):
                    await asyncio.sleep(draw.expovariate(1 / args.think))
                    times = await ask(http, models[number % len(models)], draw, args.max_tokens)
                    first.append(times[1] - times[0])
                    between.extend(np.diff(times[1:]))
                    tokens.append(len(times) - 1)
                    bar.update()

            started = time.perf_counter()
            await asyncio.gather(*map(client, range(clients)))
            seconds = time.perf_counter() - started

    def percentile(values: list[float], q: int) -> float:
        return round(float(np.percentile(values, q)) * 1000, 1)

    return {
        "answers": len(tokens),
        "tokens_per_s": round(len(tokens) * args.max_tokens / seconds, 1),
        "first_token_ms_p50": percentile(first, 50),
        "first_token_ms_p99": percentile(first, 99),
        "between_tokens_ms_p50": percentile(between, 50),
        "between_tokens_ms_p99": percentile(between, 99),
    }


async def ask(http: httpx.AsyncClient, model: str, draw: random.Random, max_tokens: int) -> list[float]:
    """One streamed answer: when it was asked, then when each piece of text came."""
    question = "*".join(draw.choice(WORDS) for _ in range(draw.randrange(6, 20)))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "max_tokens": max_tokens,
        "temperature": 1,
        "seed": draw.randrange(1 << 30),
    }
    times = [time.perf_counter()]
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return times


def resident(pid: int) -> int:
    """The memory of a process and of those that it has started, in MB."""
    import psutil

    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) >> 20


if __name__ == "__main__":
    main()
