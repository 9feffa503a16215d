"""Which method: each on the demo's base and data, and on 12 layers. Prints a table and one JSON line last.

    python benchmarks/methods.py [--methods prefix lora-8 …] [--output_dir output/methods] [--steps 250]

Speed: the same random rows with each method, in processes of their own, by turns, `--rounds` times; the best round counts. It is
told by the clock and by the processor's time, which other programs disturb less. Scores: a whole run of `ptuning train` with
configs/ptuning_demo.yaml and the recipe below, for as many steps as the others, and for as many as fit into the time that the
first method's steps take. A finished run with the same options that is in --output_dir already isn't repeated, and
`ptuning report` shows them side by side. Serving: 12 layers with what was tuned, 16 clients. Each method trains with the kernels
that `ptuning train` has by default. `--part` measures the demo or the 12 layers alone; `--small` shows that it runs.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RANDOM_ROWS, Template, add_model_arguments, random_rows, sample_lengths, stamp, wait
from benchmarks.serve import TINY, make_base, measure, server

ROOT = Path(__file__).resolve().parents[1]
BATCH, WARMUP_STEPS = 16, 2
DEMO, LARGE = "demo", "large"

START = "forkserver"  # of the processes that measure
PROJECTION = {"pre_seq_len": 128, "prefix_projection": True, "fold_projection": True, "prefix_dropout": 0.0}
# How each is tuned: docs/methods.md tells how the learning rates were found.
RECIPES: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix", "pre_seq_len": 128, "learning_rate": 5e-2},
    "prefix-projection": PROJECTION | {"method": "prefix", "learning_rate": 1e-2},
    "lora-8": {"method": "lora", "lora_rank": 8, "learning_rate": 5e-3},
    "lora-32": {"method": "lora", "lora_rank": 32, "learning_rate": 1e-2},
    "lora+prefix": PROJECTION | {"method": "lora+prefix", "lora_rank": 8, "learning_rate": 5e-3},
    "full": {"method": "full", "learning_rate": 3e-3},
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `more` are options of every run that is scored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--part", choices=[DEMO, LARGE], help="default: both")
    parser.add_argument("--output_dir", type=Path, default=Path("output/methods"), help="the runs' folders lie in it")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=2, help="of the measurement of speed")
    parser.add_argument(
        "--samples", type=int, default=64, help=f"timed samples a round; {WARMUP_STEPS} more steps warm up"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--think", type=float, default=0.2, help="mean seconds between an answer and the next question")
    parser.add_argument("--small", action="store_true", help="a few steps, rows and tokens, and one small layer")
    add_model_arguments(parser)
    parser.set_defaults(vocab=2048, more={})  # the small tokenizer's
    args = parser.parse_args(argv)
    if args.small:
        args.steps, args.rounds, args.samples, args.clients, args.requests, args.max_tokens = 3, 1, BATCH, 2, 1, 4
        args.layers, args.hidden, args.heads, args.ffn = 1, 64, 2, 64
        args.more = {"max_train_samples": 64, "max_eval_samples": 4, "max_predict_samples": 4, "warmup_steps": 0}
        args.more["max_target_length"] = 16
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = measured(args, Path(folder))
    summary = {
        **stamp("methods"),
        "device": args.device,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "steps": args.steps,
        "layers": args.layers,
        "hidden": args.hidden,
        "clients": args.clients,
        "methods": results,
    }
    print(table(results))
    print(json.dumps(summary))


def measured(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """All figures of each method."""
    results: dict[str, dict] = {name: {"learning_rate": RECIPES[name]["learning_rate"]} for name in args.methods}
    base, count = folder / "base", args.samples + WARMUP_STEPS * BATCH
    make_base(base, args)
    speeds = {DEMO: (TINY, demo_lengths(count)), LARGE: (base, sample_lengths(args.lengths, count))}
    parts = [args.part] if args.part else list(speeds)
    for number in range(args.rounds):
        for name in args.methods:
            for key in parts:
                log, kept = folder / f"{name}-{key}.log", folder / name / key
                figures = apart(log, train, RECIPES[name], *speeds[key], kept, args.device)
                best = results[name].get(key)
                if best is None or figures["samples_per_cpu_second"] > best["samples_per_cpu_second"]:
                    results[name][key] = figures
                print(name, key, number, figures, flush=True)
    for name in args.methods if DEMO in parts else ():
        first, own = (results[each][DEMO]["samples_per_cpu_second"] for each in (args.methods[0], name))
        share = own / first
        for key, steps in (("same_steps", args.steps), ("same_time", max(round(args.steps * share), 1))):
            if key == "same_time" and abs(share - 1) < 0.05:
                results[name][key] = results[name]["same_steps"]
                continue
            results[name][key] = scores(args, name, steps)
            print(name, key, results[name][key], flush=True)
    for name in args.methods if LARGE in parts else ():
        results[name]["serving"] = serving(args, base, folder / name / LARGE)
        print(name, results[name]["serving"], flush=True)
    return results


def apart(log: Path, function: Callable, *arguments: Any) -> Any:
    """What the function returns, called in a process that does nothing else and writes what it prints to `log`."""
    context = get_context(START)
    context.set_forkserver_preload(["ptuning.main", "benchmarks.methods"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_write_to, initargs=(log,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BaseException:
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
            raise


def _write_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)


def flags(options: Mapping[str, Any]) -> list[str]:
    """As they stand on a command line."""
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def train(
    recipe: dict[str, Any], base: Path, lengths: list[tuple[int, int]], kept: Path, device: str
) -> dict[str, Any]:
    """Trains on random rows in this process, and measures. What was tuned is left in `kept`."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    from ptuning import distributed
    from ptuning.config import parse
    from ptuning.main import build_model, manifest_of
    from ptuning.methods import SaveTarget, method_of
    from ptuning.training.kernels import chosen_kernels
    from ptuning.training.machine import peak_rss
    from ptuning.training.run import build_trainer

    rows = random_rows(lengths, 2048)
    with tempfile.TemporaryDirectory() as folder:
        options = recipe | RANDOM_ROWS | {"model_name_or_path": base, "output_dir": folder}
        options |= {"learning_rate": 1e-6, "per_device_train_batch_size": BATCH}  # stays random
        options |= {"logging_steps": 1000, "use_cpu": device == "cpu"}
        config, _ = parse(["--do_train", *flags(options)], prepare=distributed.prepare)
        method = method_of(config.model, trains=True)
        kernels = chosen_kernels(config, method)
        model = build_model(config, method, print, kernels)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        class Clock(TrainerCallback):
            started = ended = (0.0, 0.0)

            def on_step_end(self, training, state, control, **kwargs):
                wait(device)
                now = time.perf_counter(), time.process_time()
                if state.global_step == WARMUP_STEPS:
                    self.started = now
                self.ended = now

        clock = Clock()
        trainer = build_trainer(config, model, Template(), method, {"train": rows}, None, kernels=kernels)
        trainer.add_callback(clock)
        trainer.train()
        peak = peak_rss() if device == "cpu" else torch.cuda.max_memory_reserved()
        method.finish(model)
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        manifest = manifest_of(config, method, torch.float32)
        method.save(
            model, AutoTokenizer.from_pretrained(base), manifest, SaveTarget(kept, True, config.training.device)
        )
    seconds, cpu_seconds = (end - start for start, end in zip(clock.started, clock.ended, strict=True))
    samples = len(rows) - WARMUP_STEPS * BATCH
    return {
        "trained": trained,
        "kernels": kernels.kernels,
        "samples_per_second": round(samples / seconds, 2),
        "samples_per_cpu_second": round(samples / cpu_seconds, 2),
        "peak_mb": round(peak / 2**20),
        "checkpoint_mb": round(sum(file.stat().st_size for file in kept.rglob("*.safetensors")) / 2**20, 2),
    }


def demo_lengths(count: int) -> list[tuple[int, int]]:
    """Tokens of prompts and answers as in data/advertise."""
    draw = random.Random(1)
    return [(round(draw.gauss(44, 4)), round(draw.gauss(47, 7))) for _ in range(count)]


def scores(args: argparse.Namespace, name: str, steps: int) -> dict[str, Any]:
    """Trains the demo's base on the demo's data, answers its test rows and the probe."""
    from ptuning.methods import method_class
    from ptuning.runs import RunFolder

    recipe, folder = RECIPES[name], args.output_dir / f"{name}-{steps}"
    of_methods = {option for each in RECIPES.values() for option in method_class(each["method"]).options}
    demo = yaml.safe_load((ROOT / "configs" / "ptuning_demo.yaml").read_text(encoding="utf-8"))
    options = {key: value for key, value in demo.items() if key not in of_methods}
    options |= recipe | {"max_steps": steps, "baseline": False, "eval_steps": steps, "save_steps": steps}
    options |= {key: str(ROOT / demo[key]) for key in ("model_name_or_path", "train_file", "validation_file")}
    options |= {"output_dir": str(folder), "report_to": "none", "use_cpu": args.device == "cpu"} | args.more
    run = RunFolder(folder)
    there = run.latest_record().get("config", {})
    finished = (folder / "metrics.json").is_file() and all(
        there.get(key) == value for key, value in (recipe | args.more | {"max_steps": steps}).items()
    )
    if not finished:
        print(f"{name}: {steps} steps", flush=True)
        apart(args.output_dir / f"{name}-{steps}.log", _run, flags(options | {"overwrite_output_dir": True}))
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    tuned, probe = found["tuned"], found["probe"]
    return {
        "steps": steps,
        "eval_loss": round(found["validation"]["eval_loss"], 4),
        "scores": {key: [round(tuned[key], 2), *tuned["intervals"][key]] for key in ("bleu-4", "rouge-l")},
        "forgetting": {key: probe[key] for key in ("same", "base_loss", "tuned_loss", "interval")},
    }


def _run(argv: list[str]) -> None:
    from ptuning.main import main as ptuning

    if status := ptuning(argv):
        raise RuntimeError(f"the run ended with status {status}")


def serving(args: argparse.Namespace, base: Path, kept: Path) -> dict[str, float]:
    """What was tuned, with all clients on it."""
    whole = (kept / "config.json").is_file()  # a model of its own
    name = "base" if whole else "tuned"
    with server(kept if whole else base, {} if whole else {name: kept}, "continuous", args.clients) as (url, _):
        measure(url, args, 1, 1, [name])  # warms up
        return measure(url, args, args.clients, args.requests, [name])


def table(results: Mapping[str, dict]) -> str:
    """The figures as Markdown; samples a second of the processor's time."""
    head = "method, rate | trained | checkpoint | samples/s | 12 layers: samples/s | peak memory | tokens/s served "
    head += "| BLEU-4, same steps | same time | ROUGE-L | unchanged | base's answers"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for name, found in results.items():
        first, last = ["–"] * 3, ["–"] * 5
        if DEMO in found:
            first, last = _demo_cells(found)
        large = ["–"] * 3
        if LARGE in found:
            speed = found[LARGE]
            large = [f"{speed['samples_per_cpu_second']:.2f}", f"{speed['peak_mb'] / 1024:.1f} GB"]
            large.append(f"{found['serving']['tokens_per_s']:.0f}")
        lines.append("| " + " | ".join([f"{name}, {found['learning_rate']:g}", *first, *large, *last]) + " |")
    return "\n".join(lines)


def _demo_cells(found: dict) -> tuple[list[str], list[str]]:
    demo, steps, timed = (found[key] for key in (DEMO, "same_steps", "same_time"))
    bleu, in_time, rouge = steps["scores"]["bleu-4"], timed["scores"]["bleu-4"], steps["scores"]["rouge-l"]
    speed = [
        f"{demo['trained']:,}",
        f"{demo['checkpoint_mb']:.1f} MB",
        f"{demo['samples_per_cpu_second']:.1f}",
    ]
    return speed, [
        f"{bleu[0]:.1f} ({bleu[1]:.1f}–{bleu[2]:.1f})",
        f"{in_time[0]:.1f} ({in_time[1]:.1f}–{in_time[2]:.1f}), {timed['steps']} steps",
        f"{rouge[0]:.1f}",
        f"{steps['forgetting']['same']:.0f} %",
        f"→ {steps['forgetting']['tuned_loss']:.2f}",
    ]


if __name__ == "__main__":
    main()
