"""The real shape of ChatGLM2-6B on this machine, in 16 bit, int8, int4 and nf4. Prints one JSON line last.

    python benchmarks/size.py                       13 GB of disk, 20 GB of memory for the 16-bit base, the others 8
    python benchmarks/size.py --bases int4 nf4      some of them
    python benchmarks/size.py --small               a tiny shape

Random weights in the official fp16 format are written into --folder (default: a temporary one, deleted at the end), shard by
shard. Each figure comes from a process of its own: loading and decoding 16 tokens at batch 1 and 4; one step of P-Tuning (prefix
128) and of LoRA (rank 8) on one row of 193 tokens, with the tuned checkpoint saved and loaded back. `resident` is the peak of the
process with the weight files' mapped pages, `anonymous` without them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import SIX_B, TINY_SHAPE, write_base

BASES = {"16 bit": [], "int8": ["--quantization_bit", "8"], "int4": ["--quantization_bit", "4"]}
BASES |= {"nf4": ["--quantization", "nf4"]}
METHODS = {"prefix": ["--method", "prefix", "--pre_seq_len", "128"], "lora": ["--method", "lora"]}
SOURCE, TARGET = 65, 128  # tokens of the row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--train", nargs="*", choices=BASES, default=["int4", "nf4"], help="bases that are trained on")
    parser.add_argument("--tokens", type=int, default=16, help="decoded")
    parser.add_argument("--dtype", default="bfloat16", help="that the base computes in")
    parser.add_argument("--cpu_kernels", choices=["exact", "fast"], default="fast", help="of decoding")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="for the weights; kept")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        kind, base = args.part
        print(json.dumps(answering(args, base) if kind == "decode" else training(args, base, kind)))
        return
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        args.folder = args.folder or Path(temporary)
        needed = 0.1e9 if args.small else 13e9
        if not (args.folder / "config.json").exists():
            if shutil.disk_usage(args.folder).free < needed:
                raise SystemExit(f"{args.folder}: needs {needed / 1e9:g} GB of disk; give --folder on a larger one")
            write_base(args.folder, TINY_SHAPE if args.small else SIX_B)
        results = {base: measured("decode", base, args) for base in args.bases}
        for base in args.train:
            for method in METHODS:
                results.setdefault(base, {})[method] = measured(method, base, args)
    shape = TINY_SHAPE if args.small else SIX_B
    print(json.dumps({"benchmark": "size", **shape, "dtype": args.dtype, "threads": args.threads, "results": results}))


def measured(part: str, base: str, args: argparse.Namespace) -> dict:
    """One part in a process of its own."""
    flags = ["--folder", args.folder, "--tokens", args.tokens, "--dtype", args.dtype, "--threads", args.threads]
    flags += ["--cpu_kernels", args.cpu_kernels]
    command = [sys.executable, __file__, "--part", part, base, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(list(map(str, command)), env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{part} on {base}\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(base, part, json.dumps(found), flush=True)
    return found


class Peak:
    """Inside, the highest resident and anonymous memory of this process, in GB."""

    def __enter__(self):
        self.resident = self.anonymous = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            sizes = {name: int(value.split()[0]) * 1024 / 1e9 for name, value in fields(lines, "VmRSS", "RssAnon")}
            self.resident = max(self.resident, sizes["VmRSS"])
            self.anonymous = max(self.anonymous, sizes["RssAnon"])

    def figures(self) -> dict[str, float]:
        return {"resident_gb": round(self.resident, 2), "anonymous_gb": round(self.anonymous, 2)}


def fields(lines: list[str], *names: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (line.partition(":") for line in lines) if name in names]


def configured(args: argparse.Namespace, base: str, *flags: object):
    """A run's options and method."""
    from ptuning.config import parse
    from ptuning.methods import defaults_of, method_of

    given = ["--do_train", "--train_file", "-", "--prompt_column", "-", "--response_column", "-", "--report_to", "none"]
    given += ["--model_name_or_path", args.folder, "--output_dir", args.folder / "run", "--dtype", args.dtype]
    given += ["--max_source_length", SOURCE, "--max_target_length", TARGET, "--per_device_train_batch_size", 1]
    given += ["--max_steps", 1, "--save_strategy", "no", "--use_cpu", "true", *BASES[base], *flags]
    config, _ = parse(list(map(str, given)), defaults=defaults_of)
    return config, method_of(config.model, trains=True)


def answering(args: argparse.Namespace, base: str) -> dict:
    """Loading, and tokens/s of `generate` at batch 1 and 4, with a prefix attached."""
    import torch

    from ptuning.loading import load_base
    from ptuning.methods.prefix.attach import attach_prefix
    from ptuning.quantization import asked_precision, choose_kernels

    config, _ = configured(args, base)
    with Peak() as loading:
        started = time.perf_counter()
        model = load_base(args.folder, dtype=args.dtype, device="cpu", precision=asked_precision(config.model))
        choose_kernels(model, args.cpu_kernels, lambda line: print(line, file=sys.stderr))
        attach_prefix(model, 128).eval()
        seconds = time.perf_counter() - started
    rates = {}
    with Peak() as decoding:
        for rows in (1, 4):
            ids = torch.arange(3, 3 + rows * 32).view(rows, 32)
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            rates[rows] = rows * args.tokens / decode_seconds(model, ids, args.tokens)
    rates = {f"tokens_per_s_at_{rows}": round(rate, 2) for rows, rate in rates.items()}
    return {"load": {"seconds": round(seconds, 1), **loading.figures()}, "decode": rates | decoding.figures()}


def decode_seconds(model, ids, tokens: int) -> float:
    """Seconds for so many new tokens beyond the first, which is the prompt's."""
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    first = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False)
    return time.perf_counter() - started - first


def training(args: argparse.Namespace, base: str, name: str) -> dict:
    """One step, then the tuned checkpoint saved and loaded back; beside it what `ptuning estimate` says."""
    from common import Template, random_rows

    from ptuning.main import build_model, manifest_of
    from ptuning.methods import attach_checkpoint, detach
    from ptuning.training.estimate import estimate_run
    from ptuning.training.run import build_trainer

    config, method = configured(args, base, *METHODS[name])
    estimate = estimate_run(config, method, longest=(SOURCE + TARGET, TARGET))
    model = build_model(config, method, lambda line: None)
    rows = random_rows([(SOURCE, TARGET)], model.config.vocab_size)
    trainer = build_trainer(config, model, Template, method, {"train": rows}, manifest_of(config, method, model.dtype))
    with Peak() as peak:
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    started = time.perf_counter()
    trainer.save_model()
    saved = time.perf_counter() - started
    detach(model)
    started = time.perf_counter()
    attach_checkpoint(model, args.folder / "run", args.folder)
    loaded = time.perf_counter() - started
    shutil.rmtree(args.folder / "run")
    figures = {"step_seconds": seconds, "save_seconds": saved, "load_seconds": loaded}
    said = estimate.need.host_peak / 1e9
    return {name: round(value, 1) for name, value in figures.items()} | peak.figures() | {"estimate_gb": round(said, 2)}


if __name__ == "__main__":
    main()
