"""P-Tuning training speed: this package's default against the official way, on the same samples and the same model.

    python benchmarks/train.py [--samples 128] [--device cuda --dtype bfloat16] [--layers 12 --hidden 512 …]

Each way runs in a process of its own, one after the other. The official way is what THUDM's ptuning/train.sh does: batch
1 × 16 accumulation steps, every row padded to 64 + 128 + 1 tokens, gradient checkpointing on, logits for every position.
The last line of the output is JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    MAX_SOURCE,
    MAX_TARGET,
    Template,
    add_model_arguments,
    matmul_rate,
    model_config,
    random_rows,
    sample_lengths,
    wait,
)
from ptuning.methods.prefix.attach import attach_prefix

WAYS = ("ours", "official")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="run one way in this process (used internally)")
    parser.add_argument("--samples", type=int, default=128, help="timed samples; 32 more warm up")
    parser.add_argument("--batch", type=int, default=16, help="rows a step of our way")
    add_model_arguments(parser)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    return parser.parse_args()


def needed_flops(args: argparse.Namespace, lengths: list[tuple[int, int]]) -> float:
    """FLOPs that the job itself needs a sample, on average: real tokens only, logits where labels are, and no gradient of
    the frozen weights: forward 2, backward to the activations 2 for each weight and token."""
    head = args.hidden // args.heads
    layer = (
        args.hidden * (args.heads + 2 * args.groups) * head
        + args.heads * head * args.hidden
        + 3 * args.hidden * args.ffn
    )
    total = 0.0
    for source, target in lengths:
        tokens = source + target
        total += 4 * args.layers * layer * tokens
        total += 4 * args.vocab * args.hidden * target
        seen = tokens * (args.pre_seq_len + (tokens + 1) / 2)  # keys each query sees, summed over the queries
        total += 3 * args.layers * 4 * args.hidden * seen  # scores and values; backward twice the forward
    return total / len(lengths)


def run_way(args: argparse.Namespace) -> dict:
    """Trains in this process and measures."""
    import torch

    from ptuning.config import TuningArguments
    from ptuning.data.batch import RowDataset
    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
    from ptuning.training.machine import peak_rss
    from ptuning.training.trainer import TuningTrainer

    official = args.way == "official"
    warmup = 32
    lengths = sample_lengths(args.lengths, args.samples + warmup)
    rows = random_rows(lengths, args.vocab)

    torch.manual_seed(0)
    config = model_config(args)
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        model = ChatGLMForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    attach_prefix(model, args.pre_seq_len)

    class OfficialTrainer(TuningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {key: value for key, value in inputs.items() if key != "row"}
            return model(**inputs, num_items_in_batch=num_items_in_batch).loss

    class Clock(_clock_callback()):
        started = ended = 0.0

        def on_step_end(self, training, state, control, **kwargs):
            wait(args.device)
            if state.global_step == warmup // 16:
                self.started = time.perf_counter()
            self.ended = time.perf_counter()

    clock = Clock()
    accumulation = 16 if official else max(16 // args.batch, 1)
    with tempfile.TemporaryDirectory() as folder:
        training = TuningArguments(
            output_dir=folder,
            per_device_train_batch_size=1 if official else args.batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=2e-2,
            gradient_checkpointing=official,
            train_sampling_strategy="random" if official else "group_by_length",
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = (OfficialTrainer if official else TuningTrainer)(
            model=model,
            args=training,
            method=None,
            template=Template(),
            manifest=None,
            pad_to=MAX_SOURCE + MAX_TARGET + 1 if official else None,
            train_dataset=RowDataset(rows),
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.ended - clock.started
    result = {
        "samples_per_second": round(args.samples / seconds, 3),
        "seconds": round(seconds, 2),
        "peak_rss_mb": round(peak_rss() / 2**20),
    }
    if args.device != "cpu":
        result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    rate = matmul_rate(args.device, dtype)
    flops = needed_flops(args, lengths[warmup:])
    result["matmul_gflops"] = round(rate / 1e9, 1)
    result["share_of_matmul"] = round(flops * result["samples_per_second"] / rate, 3)
    return result


def _clock_callback():
    from transformers import TrainerCallback

    return TrainerCallback


def main() -> None:
    args = arguments()
    if args.way:
        print(json.dumps(run_way(args)))
        return
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
        print(way, results[way], flush=True)
    summary = {
        "benchmark": "train",
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "device": args.device,
        "dtype": args.dtype,
        "real_lengths": args.lengths.exists(),
        "samples": args.samples,
        "ratio": round(results["ours"]["samples_per_second"] / results["official"]["samples_per_second"], 2),
        **results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
