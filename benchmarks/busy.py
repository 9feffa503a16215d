"""What a busy machine costs: the demo's training rate, alone and beside N busy processes, for several ways to wait.

    python benchmarks/busy.py [--busy 0 2 4] [--spins 0 1000 10000 100000 300000] [--steps 60] [--rounds 2]

A spin count is how long torch's OpenMP threads wait for each other before they sleep (GOMP_SPINCOUNT; 300,000 is libgomp's own,
0 is OMP_WAIT_POLICY=passive). Each run is `ptuning/main.py` in a process of its own; the rate is the median of its log lines,
and of several rounds the best counts. Run it on an idle machine. The last line of the output is JSON.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import stamp

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--busy", nargs="+", type=int, default=[0, 2, 4], help="processes that only count, beside the run"
    )
    parser.add_argument("--spins", nargs="+", type=int, default=[0, 1_000, 10_000, 100_000, 300_000])
    parser.add_argument("--steps", type=int, default=60, help="of 16 rows; one log line for every fifth")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many processes do nothing but count."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def samples_per_second(spins: int, steps: int) -> float:
    """The median rate of one run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"GOMP_SPINCOUNT": str(spins)} | ({"OMP_WAIT_POLICY": "passive"} if spins == 0 else {})
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": "configs/ptuning_demo.yaml",
            "output_dir": folder,
            "max_steps": steps,
            "logging_steps": 5,
            "save_strategy": "no",
            "eval_strategy": "no",
            "do_predict": False,
            "baseline": False,
            "probe": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "ptuning" / "main.py"), *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in lines if "loss" in line]
    return statistics.median(rates[1:] or rates)  # the first has the warming up in it


def main() -> None:
    args, results = arguments(), {}
    for count in args.busy:
        for _ in range(args.rounds):  # the ways in turns, so that what else happens on the machine meets all of them
            for spins in args.spins:
                with busy(count):
                    rate = samples_per_second(spins, args.steps)
                rates = results.setdefault(f"busy_{count}", {})
                rates[str(spins)] = max(rate, rates.get(str(spins), 0.0))
                print(f"{count} busy processes, {spins} spins: {rate:.1f} samples/s", flush=True)
    summary = {
        **stamp("busy"),
        "cores": os.cpu_count(),
        "steps": args.steps,
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
