"""Every benchmark small, one after the other, in under three minutes: a figure each to compare before and after a change.

    python benchmarks/all.py [--output before.json] [--only train serve …]
    python benchmarks/compare.py before.json after.json

Small models and few rows, so the figures are no claims by themselves; run it on an idle machine, before and after on the same one.
Writes one JSON file, and prints it as the last line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SHAPE = ["--layers", "4", "--hidden", "256", "--heads", "4", "--groups", "2", "--ffn", "768", "--vocab", "2048"]

# Script → its flags here, in the order in which they run.
SMALL = {
    "train": [*SHAPE, "--preload", "--samples", "64", "--ways", "ours", "official", "ours_lora", "peft_lora"],
    "full": [*SHAPE, "--samples", "48", "--ways", "plain", "--processes", "1"],
    "generate": [*SHAPE, "--rows", "96", "--single_rows", "4"],
    "serve": [
        *SHAPE,
        "--clients",
        "1",
        "8",
        "--compare_at",
        "8",
        "--requests",
        "2",
        "--max_tokens",
        "16",
        "--prompt_tokens",
        "200",
    ],
    "long": ["--small", "--kernels", "fast", "--tokens", "1024", "2048"],
    "cpu_serving": ["--small", "--engines", "int8", "--turns", "4", "--threads", "1"],
    "size": ["--small", "--bases", "int4", "--train", "--threads", "1"],
}
# These have no small form that says anything.
LEFT_OUT = {
    "gpu": "needs a GPU: bash benchmarks/gpu.sh",
    "proof": "takes its five minutes",
    "methods": "scores of whole training runs",
    "busy": "needs a machine that is busy on purpose",
    "verdicts": "reads predictions that are there",
    "llama_cpp_rate": "builds another program",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: output/benchmarks/TIME.json")
    parser.add_argument("--only", nargs="+", choices=SMALL, default=list(SMALL))
    args = parser.parse_args(argv)
    started, now = time.perf_counter(), datetime.now()
    output = args.output or Path("output/benchmarks") / f"{now:%Y-%m-%d-%H%M%S}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results, failed = {}, []
    for name in args.only:
        results[name] = run(name)
        if "failed" in results[name]:
            failed.append(name)
    summary = {
        "benchmark": "all",
        "date": now.isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[1], 2),  # of the five minutes; above the cores the figures say little
        "commit": commit(),
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }
    output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    print(json.dumps(summary))
    return 1 if failed else 0


def run(name: str) -> dict:
    """A benchmark's last line with the seconds that it took, or what it died of."""
    started = time.perf_counter()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 1)
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": done.stderr[-2000:]}
    print(f"{name}: {'failed: ' + found['failed'][-300:] if 'failed' in found else 'done'} ({seconds} s)", flush=True)
    return found | {"took_seconds": seconds}


def commit() -> str | None:
    """The version that was measured, with a plus sign where files have changed since."""
    git = ["git", "-C", str(FOLDER)]
    described = subprocess.run([*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return described.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
