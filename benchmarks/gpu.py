"""ChatGLM2-6B's real shape on a GPU: training by each method, and answering. Writes one JSON file and prints a table.

    bash benchmarks/gpu.sh                          13 GB of disk, 30 GB of GPU memory; all weights only where they fit (110 GB)
    bash benchmarks/gpu.sh --ways prefix qlora      some of them
    python benchmarks/gpu.py --small --device cpu   a tiny shape, to see that it runs

Random weights in the official fp16 format; ADGEN's lengths, or ones of that mean and spread. Each way trains in a process of its
own, as `ptuning train` does with the flags in WAYS, after two steps that warm up. "tokens_per_s" are real ones, without padding;
"tflops" what the method needs for them (2 FLOP a weight forward, 2 backward, 2 more where the weights train; nothing for what
is computed twice), "share" that of what one product of large bf16 matrices reaches on the same card. "answers" is
benchmarks/generate.py: the engine's tokens/s with 64 rows, and one row after the other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    RANDOM_ROWS,
    SHARED_LENGTHS,
    SIX_B,
    TINY_SHAPE,
    Template,
    matmul_rates,
    random_rows,
    sample_lengths,
    stamp,
    wait,
    write_base,
)

HERE = Path(__file__).resolve().parent
WAYS = {
    "prefix": ["--method", "prefix", "--pre_seq_len", "128"],
    "prefix, checkpointing": ["--method", "prefix", "--pre_seq_len", "128", "--gradient_checkpointing", "true"],
    "lora": ["--method", "lora"],
    "qlora": ["--method", "lora", "--quantization", "nf4"],
    "full": ["--method", "full", "--bf16", "true"],
}
WARMUP_STEPS = 2
COLUMNS = ("samples_per_s", "tokens_per_s", "tflops", "share", "peak_gpu_mb")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=20, help=f"timed; {WARMUP_STEPS} more warm up")
    parser.add_argument("--batch", type=int, default=32, help="rows a step: about 4,000 tokens")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, help="for the weights; kept")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/gpu.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.way:
        print(json.dumps(train(args)))
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: run this on a machine with one (CUDA, 30 GB of GPU memory)")
        return 0
    shape = TINY_SHAPE if args.small else SIX_B
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        args.folder = args.folder or Path(temporary)
        if not (args.folder / "config.json").exists():
            write_base(args.folder, shape)
        rate = max(matmul_rates(args.device, torch.bfloat16).values())
        card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        results = {"training": {way: in_a_process(args, way) for way in args.ways}, "answers": answers(args, shape)}
    for way, found in results["training"].items():
        if "tokens_per_s" in found:
            needed = flops_a_token(shape, trains_weights=way == "full") * found["tokens_per_s"]
            found |= {"tflops": round(needed / 1e12, 1), "share": round(needed / rate, 3)}
    summary = {**stamp("gpu"), "card": card, "matmul_tflops": round(rate / 1e12, 1), "batch": args.batch, **results}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(table(summary))
    print(f"wrote {args.output}")
    print(json.dumps(summary))
    return 1 if any("failed" in found for found in results["training"].values()) else 0


def table(summary: dict) -> str:
    """As docs/benchmarks.md has it."""
    lines = [f"{summary['card']}, bf16 products {summary['matmul_tflops']} TFLOP/s, {summary['batch']} rows a step", ""]
    lines += ["| way | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for way, found in summary["training"].items():
        cells = [str(found.get(name, "–")) for name in COLUMNS]
        lines.append(f"| {way} | " + (found["failed"] if "failed" in found else " | ".join(cells)) + " |")
    answered = summary["answers"]
    said = answered.get("failed") or (
        f"{answered['engine_tokens_per_s']} tokens/s with 64 rows, {answered['batch_1_tokens_per_s']} one by one"
    )
    return "\n".join([*lines, "", f"answers: {said}"])


def flops_a_token(shape: dict[str, int], trains_weights: bool) -> float:
    """FLOPs of the weights' products a token of ADGEN, the output layer's where labels are (60 % of the tokens)."""
    head = shape["hidden"] // shape["heads"]
    layer = shape["hidden"] * (2 * shape["hidden"] + 2 * shape["groups"] * head + 3 * shape["ffn"])
    return (6 if trains_weights else 4) * (shape["layers"] * layer + 0.6 * shape["vocab"] * shape["hidden"])


def in_a_process(args: argparse.Namespace, way: str) -> dict:
    command = [sys.executable, __file__, "--way", way, "--folder", str(args.folder), "--device", args.device]
    command += ["--steps", str(args.steps), "--batch", str(args.batch)]
    return last_line(command)


def answers(args: argparse.Namespace, shape: dict[str, int]) -> dict:
    widths = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(HERE / "generate.py"), *widths, "--device", args.device, "--dtype", "bfloat16"]
    return last_line([*command, "--rows", "8" if args.small else "192", "--single_rows", "1" if args.small else "12"])


def last_line(command: list[str]) -> dict:
    """A process's figures, or what it died of."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def train(args: argparse.Namespace) -> dict:
    """One way, in this process."""
    import torch
    from transformers import TrainerCallback

    from ptuning.config import parse
    from ptuning.main import build_model
    from ptuning.methods import defaults_of, method_of
    from ptuning.training.estimate import estimate_run
    from ptuning.training.kernels import chosen_kernels
    from ptuning.training.run import build_trainer

    count = (args.steps + WARMUP_STEPS) * args.batch
    lengths = sample_lengths(SHARED_LENGTHS, count)
    with tempfile.TemporaryDirectory() as folder:
        options = RANDOM_ROWS | {
            "model_name_or_path": args.folder,
            "output_dir": folder,
            "per_device_train_batch_size": args.batch,
            "gradient_accumulation_steps": 1,
            "logging_steps": 10_000,
            "use_cpu": args.device == "cpu",
        }
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        config, _ = parse(["--do_train", *given, *WAYS[args.way]], defaults=defaults_of)
        method = method_of(config.model, trains=True)
        longest = max(lengths, key=sum)
        estimate_run(config, method, longest=(sum(longest), longest[1])).require_fit()
        kernels = chosen_kernels(config, method)
        model = build_model(config, method, print, kernels)

        class Clock(TrainerCallback):
            started = ended = 0.0

            def on_step_end(self, training, state, control, **kwargs):
                wait(args.device)
                self.ended = time.perf_counter()
                if state.global_step == WARMUP_STEPS:
                    self.started = self.ended

        clock, rows = Clock(), {"train": random_rows(lengths, model.config.vocab_size)}
        trainer = build_trainer(config, model, Template(), method, rows, None, kernels=kernels)
        trainer.add_callback(clock)
        trainer.train()
    seconds, tokens = clock.ended - clock.started, sum(map(sum, lengths)) / count
    samples = args.steps * args.batch / seconds
    found = {"samples_per_s": round(samples, 2), "tokens_per_s": round(samples * tokens)}
    if args.device == "cuda":
        found["peak_gpu_mb"] = torch.cuda.max_memory_reserved() >> 20
    return found


if __name__ == "__main__":
    sys.exit(main())
