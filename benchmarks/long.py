"""Long rows: memory a token and seconds of a training step, and of an answer's prompt. Prints one JSON line last.

    python benchmarks/long.py [--tokens 1024 … 32768] [--kernels plain fast] [--memory_mb 2500]

The tiny model with a prefix of 128, one row a step, fp32; each way in a process of its own: with and without gradient
checkpointing, for each of --kernels. A length whose step would take more than --memory_mb,
going by how memory has grown before, is left out (null). Memory is what a step takes at its peak beside the model.
"""

import argparse
import ctypes
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RANDOM_ROWS, TINY, stamp

PREFIX = 128
KERNELS = ["plain", "fast"]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", help="run one way in this process (used internally)")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1,024 to 32,768; with --small 128 and 256")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--memory_mb", type=int, default=2500, help="of a step at most")
    parser.add_argument("--small", action="store_true", help="all ways in one process")
    args = parser.parse_args(argv)
    if args.tokens is None:
        args.tokens = [128, 256] if args.small else [1024 << n for n in range(6)]
    return args


def ways(args: argparse.Namespace) -> list[str]:
    """Named as they are printed."""
    return [*(f"{name}{more}" for name in args.kernels for more in ("", ", checkpointing")), "prompt"]


class Meter:
    """Peak memory beside what is there now, and seconds, of what is done between `start` and `stop`."""

    def start(self) -> None:
        from ptuning.training.machine import current_rss

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.before, self.started, self.worked = current_rss(), time.perf_counter(), time.process_time()

    def stop(self, tokens: int) -> dict[str, float]:
        from ptuning.training.machine import peak_rss

        seconds, worked = time.perf_counter() - self.started, time.process_time() - self.worked
        extra = max(peak_rss() - self.before, 0)
        return {
            "extra_mb": round(extra / 1e6, 1),
            "kb_per_token": round(extra / 1e3 / tokens, 1),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(worked, 2),
        }


def expected(found: dict[int, dict], tokens: int) -> float:
    """MB of a step of so many tokens: grown once more as it last did; with the square where there is only one figure."""
    lengths = sorted(found)
    if not lengths:
        return 0
    last = found[lengths[-1]]["extra_mb"]
    power = 2.0
    if len(lengths) > 1 and found[lengths[-2]]["extra_mb"] > 0:
        power = math.log(last / found[lengths[-2]]["extra_mb"]) / math.log(lengths[-1] / lengths[-2])
    return last * (tokens / lengths[-1]) ** max(power, 1.0)


def train(args: argparse.Namespace, kernel: str, checkpointing: bool) -> dict[int, dict | None]:
    """A step on one row of each length, after one on a short row."""
    from transformers import TrainerCallback

    from ptuning.config import parse
    from ptuning.data.encode import IGNORE, EncodedRow
    from ptuning.loading import load_template
    from ptuning.main import build_model, manifest_of
    from ptuning.messages import silent
    from ptuning.methods import method_of
    from ptuning.training.kernels import chosen_kernels
    from ptuning.training.run import build_trainer

    draw, rows, found = random.Random(0), [], {}
    for tokens in (64, *args.tokens):
        ids = [draw.randrange(3, 2000) for _ in range(tokens)]
        answer = min(128, tokens // 2)
        rows.append(EncodedRow(ids, [IGNORE] * (tokens - answer) + ids[-answer:], ""))

    class Steps(TrainerCallback):
        def on_step_begin(self, training, state, control, **kwargs):
            meter.start()

        def on_step_end(self, training, state, control, **kwargs):
            if state.global_step > 1:
                tokens = args.tokens[state.global_step - 2]
                found[tokens] = meter.stop(tokens)
            following = args.tokens[state.global_step - 1 : state.global_step]
            if following and expected(found, following[0]) > args.memory_mb:
                control.should_training_stop = True

    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        options = RANDOM_ROWS | {
            "model_name_or_path": TINY,
            "output_dir": folder,
            "pre_seq_len": PREFIX,
            "max_steps": len(rows),
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": checkpointing,
            "kernels": kernel,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1000,
        }
        config, _ = parse(
            ["--do_train", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        )
        method = method_of(config.model, trains=True)
        kernels = chosen_kernels(config, method)
        model = build_model(config, method, silent, kernels)
        manifest = manifest_of(config, method, model.dtype)
        template = load_template(str(TINY))
        trainer = build_trainer(config, model, template, method, {"train": rows}, manifest, kernels=kernels)
        trainer.add_callback(Steps())
        trainer.train()
    return {tokens: found.get(tokens) for tokens in args.tokens}


def prompt(args: argparse.Namespace) -> dict[int, dict | None]:
    """The engine's first token of a prompt of each length; the row's own keys and values count too."""
    from ptuning import load_model
    from ptuning.generation import Engine, GenerationRequest

    (model, _), meter, found = load_model(TINY), Meter(), {}
    with Engine(model, [], batch_tokens=2 * max(args.tokens)) as engine:
        list(engine.submit([GenerationRequest("warm", [5] * 64, 2)]))
        for tokens in args.tokens:
            engine.cache.clear()
            meter.start()
            list(engine.submit([GenerationRequest(tokens, [3 + 7919 * n % 2000 for n in range(tokens)], 1)]))
            found[tokens] = meter.stop(tokens)
    return found


def run_way(args: argparse.Namespace, way: str) -> dict[int, dict | None]:
    """In this process."""
    if way == "prompt":
        return prompt(args)
    kernel, _, more = way.partition(", ")
    return train(args, kernel, bool(more))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.way:
        print(json.dumps(run_way(args, args.way)))
        return
    results = {}
    for way in ways(args):
        if args.small:
            results[way] = json.loads(json.dumps(run_way(args, way)))
        else:
            command = [sys.executable, __file__, "--way", way, *(sys.argv[1:] if argv is None else argv)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[way] = json.loads(output.splitlines()[-1])
        print(way, results[way], flush=True)
    summary = {
        **stamp("long"),
        "prefix": PREFIX,
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
