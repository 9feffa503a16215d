"""Full-parameter training: samples/s and peak memory for plain, ZeRO-2, ZeRO-3 and offload, on one process and on two.

    python benchmarks/full.py [--samples 64] [--processes 1 2] [--ways plain zero3] [--device cuda --dtype bfloat16 …]

Each way runs in processes of its own, one way after the other, on random weights of the widths given, through the same code as
`ptuning/main.py`. The global batch is the same whatever the number of processes. `estimate_ratio` is `ptuning estimate` for
the longest row divided by the measured peak. `samples_per_cpu_second`: of processor time of the first process, for its share of the
samples. The last line of the output is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    RANDOM_ROWS,
    Template,
    add_model_arguments,
    matmul_rates,
    model_config,
    random_rows,
    sample_lengths,
    stamp,
    wait,
)

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"plain": None, "zero2": "zero2.json", "zero3": "zero3.json", "offload": "zero3_offload.json"}
WARMUP_STEPS = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=WAYS, help="run one way in this process (used internally)")
    parser.add_argument("--base", help="the model's folder (used internally)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=64, help=f"timed samples; {WARMUP_STEPS} more steps warm up")
    parser.add_argument("--batch", type=int, default=16, help="rows a step, all processes together")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=0, help="of the ways without DeepSpeed; 0: whole batches"
    )
    add_model_arguments(parser)
    return parser.parse_args()


def worker(args: argparse.Namespace) -> dict | None:
    """Trains in this process and measures. Returns the figures on the first process."""
    import torch
    from transformers import TrainerCallback

    from ptuning import distributed
    from ptuning.config import parse
    from ptuning.main import build_model
    from ptuning.methods import method_of
    from ptuning.training.estimate import estimate_run
    from ptuning.training.kernels import kernels_of
    from ptuning.training.machine import peak_rss
    from ptuning.training.run import build_trainer

    world = int(os.environ["WORLD_SIZE"])
    lengths = sample_lengths(args.lengths, args.samples + WARMUP_STEPS * args.batch)
    rows = random_rows(lengths, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        options = RANDOM_ROWS | {
            "method": "full",
            "model_name_or_path": args.base,
            "output_dir": folder,
            "per_device_train_batch_size": args.batch // world,
            "gradient_checkpointing": args.checkpointing,
            "logging_steps": 1000,
            "bf16": args.dtype == "bfloat16",
            "use_cpu": args.device == "cpu",
        }
        if WAYS[args.worker] is None:
            options["micro_batch_tokens"] = args.micro_batch_tokens
        else:
            options["deepspeed"] = ROOT / "configs" / WAYS[args.worker]
        argv = ["--do_train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
        config, _ = parse(argv, prepare=distributed.prepare)
        method = method_of(config.model, trains=True)
        with distributed.session():
            distributed.start(config.training.deepspeed is not None, config.training.ddp_timeout)
            longest = max(lengths, key=sum)
            estimate = estimate_run(config, method, longest=(sum(longest), longest[1]))
            kernels = kernels_of(config, method)
            model = build_model(config, method, print, kernels)

            class Clock(TrainerCallback):
                started = ended = (0.0, 0.0)  # by the clock on the wall, and of this process alone

                def on_step_end(self, training, state, control, **kwargs):
                    wait(args.device)
                    self.ended = time.perf_counter(), time.process_time()
                    if state.global_step == WARMUP_STEPS:
                        self.started = self.ended

            clock = Clock()
            trainer = build_trainer(config, model, Template(), method, {"train": rows}, None, kernels=kernels)
            trainer.add_callback(clock)
            trainer.train()
            seconds, cpu_seconds = (end - start for start, end in zip(clock.started, clock.ended, strict=True))
            sizes = torch.tensor([peak_rss()], dtype=torch.float64, device=config.training.device)
            total_rss = float(trainer.accelerator.reduce(sizes, "sum"))
            result = {
                "processes": world,
                "samples_per_second": round(args.samples / seconds, 3),
                "samples_per_cpu_second": round(args.samples / cpu_seconds / world, 3),
                "tokens_per_second": round(sum(map(sum, lengths[-args.samples :])) / seconds),
                "peak_rss_mb": round(total_rss / 2**20),
                "estimate_ratio": round(estimate.need.host_peak / total_rss, 3),
            }
            if args.device != "cpu":
                used = torch.cuda.max_memory_reserved()
                result["peak_gpu_mb"] = round(used / 2**20)
                result["estimate_ratio"] = round(estimate.need.device_peak / used, 3)
            return result if config.training.process_index == 0 else None


def make_base(args: argparse.Namespace, folder: str) -> int:
    """Writes a base with random weights. Returns its number of parameters."""
    import torch

    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = ChatGLMForConditionalGeneration(model_config(args))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def launch(args: argparse.Namespace, way: str, processes: int, base: str) -> dict:
    """One way on so many processes, in processes of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, __file__, *sys.argv[1:], "--worker", way, "--base", base]
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if output.returncode:
        raise SystemExit(f"{way} on {processes} processes failed:\n{output.stdout[-3000:]}")
    return json.loads(next(line for line in reversed(output.stdout.splitlines()) if line.startswith('{"processes"')))


def main() -> None:
    args = arguments()
    if args.worker:
        result = worker(args)
        if result is not None:
            print(json.dumps(result), flush=True)
        return
    import torch

    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as base:
        parameters = make_base(args, base)
        for way in args.ways:
            for processes in args.processes:
                name = f"{way}_{processes}"
                results[name] = launch(args, way, processes, base)
                print(name, results[name], flush=True)
    rate = max(matmul_rates(args.device, getattr(torch, args.dtype)).values())
    for name, result in results.items():
        # forward 2, backward 4 for each weight and token; recomputing for gradient checkpointing isn't counted as useful
        useful = 6 * (parameters - args.vocab * args.hidden) * result["tokens_per_second"]
        result["share_of_matmul"] = round(useful / result["processes"] / rate, 3)
        alone = results.get(f"{name.rpartition('_')[0]}_1")
        if alone is not None and result["processes"] > 1:
            result["scaling"] = round(result["samples_per_second"] / alone["samples_per_second"], 2)
    summary = {
        **stamp("full"),
        "device": args.device,
        "dtype": args.dtype,
        "parameters": parameters,
        "batch": args.batch,
        "checkpointing": args.checkpointing,
        "micro_batch_tokens": args.micro_batch_tokens,
        "real_lengths": args.lengths.exists(),
        "matmul_gflops": round(rate / 1e9, 1),
        **results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
