"""Training speed beside a frozen base: this package's ways against the official one and against peft with a plain Trainer, on the
same samples and the same model.

    python benchmarks/train.py [--samples 128] [--ways ours official …] [--device cuda --dtype bfloat16] [--layers 12 …]

Each way runs in a process of its own, one after the other:

    ours                a prefix, by default: batch 16 in length order, fast kernels, 512 tokens at a time
    ours_bf16           the same with --kernels bf16, where the processor has such products; not by default
    ours_small          the same with 192 tokens at a time: the setting for little memory
    ours_plain          the same with --kernels plain: transformers' own modules, 16 rows at once
    ours_lora           a LoRA on q, k and v, by default; ours_lora_all: on all linear layers
    official            what THUDM's ptuning/train.sh does: batch 1 × 16 accumulation steps, every row padded to 64 + 128 + 1
                        tokens, gradient checkpointing, logits for every position
    peft_prefix, peft_lora, peft_lora_all
                        what people take instead: peft's own wrapper and transformers' Trainer, batch 16 padded to its longest row

`samples_per_cpu_second` counts the time of this process alone on all its threads, for machines that do other work besides. The
matrix product rate is that of the faster of torch's two CPU libraries. The last line of the output is JSON.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ptuning  # noqa: F401  before torch, whose threads it bounds
from benchmarks.common import (
    MAX_SOURCE,
    MAX_TARGET,
    Template,
    add_model_arguments,
    matmul_rates,
    model_config,
    random_rows,
    sample_lengths,
    stamp,
    wait,
)

WAYS = (
    *("ours", "ours_bf16", "ours_small", "ours_plain", "official", "peft_prefix"),
    *("ours_lora", "peft_lora", "ours_lora_all", "peft_lora_all"),
)
ATTENTION = ["q_proj", "k_proj", "v_proj"]
EVERY = [*ATTENTION, "o_proj", "gate_up_proj", "down_proj"]
WARMUP = 32  # samples
SMALL = 192  # tokens at a time: a row of ADGEN, or two short ones


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=[way for way in WAYS if way != "ours_bf16"])
    parser.add_argument("--samples", type=int, default=128, help=f"timed samples; {WARMUP} more warm up")
    parser.add_argument("--batch", type=int, default=16, help="rows a step of our ways and peft's")
    parser.add_argument("--micro_batch_tokens", type=int, help="of ours; default: the trainer's own")
    parser.add_argument(
        "--preload",
        action="store_true",
        help="import what all ways need once, in a process that they are forks of; memory reads about 100 MB less",
    )
    parser.add_argument("--product", help="torch or onednn; default: the faster one by the trainer's own probe")
    add_model_arguments(parser)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    args = parser.parse_args()
    if args.preload and args.device != "cpu":
        parser.error(f"--preload with --device {args.device}: CUDA doesn't live through a fork; leave it out")
    return args


def needed_flops(args: argparse.Namespace, lengths: list[tuple[int, int]]) -> float:
    """FLOPs that the prefix's job itself needs a sample, on average: real tokens only, logits where labels are, and no gradient of
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

    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
    from ptuning.training.machine import peak_rss

    lengths = sample_lengths(args.lengths, args.samples + WARMUP)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        model = ChatGLMForConditionalGeneration(model_config(args))
    torch.set_default_dtype(torch.float32)
    clock = _clock(args.device, WARMUP // 16)
    made = _peft_trainer if args.way.startswith("peft") else _our_trainer
    with tempfile.TemporaryDirectory() as folder:
        made(args, model, lengths, clock, folder).train()
    peak = peak_rss()
    result = {
        "samples_per_second": round(args.samples / (clock.ended[0] - clock.started[0]), 3),
        "samples_per_cpu_second": round(args.samples / (clock.ended[1] - clock.started[1]), 3),
        "peak_rss_mb": round(peak / 2**20),
    }
    if args.device != "cpu":
        result["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    rates = matmul_rates(args.device, dtype)
    result["matmul_gflops"] = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    if "lora" not in args.way:
        flops = needed_flops(args, lengths[WARMUP:])
        result["share_of_matmul"] = round(flops * result["samples_per_second"] / max(rates.values()), 3)
    return result


def _our_trainer(args, model, lengths, clock, folder):
    """Of this package, in our ways and in the official one."""
    from ptuning.config import TuningArguments
    from ptuning.data.batch import RowDataset
    from ptuning.kernels import BF16, fastest_product, swap
    from ptuning.methods.lora.attach import attach_lora
    from ptuning.methods.prefix.attach import attach_prefix
    from ptuning.training.kernels import MICRO_BATCH_TOKENS
    from ptuning.training.trainer import TuningTrainer

    official, fast = args.way == "official", args.way in WAYS and args.way not in ("official", "ours_plain")
    if "lora" in args.way:
        from peft import LoraConfig  # 100 MB that a prefix doesn't need

        targets = EVERY if args.way.endswith("all") else ATTENTION
        attach_lora(model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets))
    else:
        attach_prefix(model, args.pre_seq_len)
    tokens = 0
    if fast and args.device == "cpu":
        swap(model, BF16 if args.way == "ours_bf16" else args.product or fastest_product())
        tokens = SMALL if args.way == "ours_small" else MICRO_BATCH_TOKENS
        tokens = tokens if args.micro_batch_tokens is None else args.micro_batch_tokens

    class OfficialTrainer(TuningTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {key: value for key, value in inputs.items() if key != "row"}
            return model(**inputs, num_items_in_batch=num_items_in_batch).loss

    return (OfficialTrainer if official else TuningTrainer)(
        model=model,
        args=TuningArguments(
            per_device_train_batch_size=1 if official else args.batch,
            gradient_accumulation_steps=16 if official else max(16 // args.batch, 1),
            learning_rate=2e-2,
            gradient_checkpointing=official,
            train_sampling_strategy="random" if official else "group_by_length",
            output_dir=folder,
            **_SHARED,
        ),
        method=None,
        template=Template(),
        manifest=None,
        pad_to=MAX_SOURCE + MAX_TARGET + 1 if official else None,
        train_dataset=RowDataset(random_rows(lengths, args.vocab)),
        callbacks=[clock],
        micro_batch_tokens=tokens,
    )


def _peft_trainer(args, model, lengths, clock, folder):
    """peft's wrapper and transformers' Trainer, as their own examples have it."""
    import torch
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    if args.way == "peft_prefix":
        shape = {"num_layers": args.layers, "num_attention_heads": args.groups}
        shape["token_dim"] = args.groups * args.hidden // args.heads
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.pre_seq_len, **shape)
    else:
        targets = EVERY if args.way.endswith("all") else ATTENTION
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=targets)

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key, fill):
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in random_rows(lengths, args.vocab)]
    batch = {
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": max(16 // args.batch, 1),
        "learning_rate": 1e-3,
        "remove_unused_columns": False,
        "use_cpu": args.device == "cpu",
    }
    return Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(output_dir=folder, **batch, **_SHARED),
        data_collator=collate,
        train_dataset=rows,
        callbacks=[clock],
    )


_SHARED = {
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1000,
    "disable_tqdm": True,
}


def _clock(device: str, first: int):
    """Notes wall and CPU seconds when step `first` has ended, and at the end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = ended = (0.0, 0.0)

        def on_step_end(self, training, state, control, **kwargs):
            wait(device)
            now = time.perf_counter(), time.process_time()
            if state.global_step == first:
                self.started = now
            self.ended = now

    return Clock()


def main() -> None:
    args = arguments()
    results = {}
    processes = multiprocessing.get_context("forkserver")
    if args.preload:
        processes.set_forkserver_preload(["ptuning.training.trainer", "ptuning.families.chatglm2.model"])
    for way in args.ways:
        args.way = way
        with ProcessPoolExecutor(1, processes) as one:
            results[way] = one.submit(run_way, args).result()
        print(way, results[way], flush=True)
    summary = {
        **stamp("train"),
        "device": args.device,
        "dtype": args.dtype,
        "real_lengths": args.lengths.exists(),
        "samples": args.samples,
        **results,
    }
    if {"ours", "official"} <= results.keys():
        rates = (results[way]["samples_per_second"] for way in ("ours", "official"))
        summary["ratio"] = round(next(rates) / next(rates), 2)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
