"""What --sequence_parallel can't do, or has not been shown to do: refused before anything is loaded, each with its fix."""

from collections.abc import Iterator

from ptuning.checkpoint.base import resolve_base
from ptuning.config import Config
from ptuning.distributed import launched
from ptuning.errors import ModelError
from ptuning.families import family_of, read_config
from ptuning.methods import Method


def check_sequence_parallel(config: Config, method: Method | None) -> Iterator[str]:
    """One sentence each, with the option's value and the fix.

    Args:
        method: what is tuned; None where nothing is.
    """
    training, model = config.training, config.model
    number = training.sequence_parallel
    if number is None:
        return
    option = f"--sequence_parallel {number}"
    if not training.do_train or method is None:
        yield f"{option} is for training; leave it out"
        return
    if (started := launched()) != number:
        there = "there is 1 process" if started == 1 else f"there are {started} processes"
        yield f"{option}: {there}, and each row is divided among all of them; start with torchrun --nproc-per-node {number}"
    if not method.trains_on_parts:
        yield (
            f"{option} with --method {method.name}: processes that have parts of the same rows train a prefix alone; use --method "
            "prefix, or leave it out"
        )
    if training.deepspeed is not None:
        yield f"{option} with --deepspeed, whose engine takes each process's rows for its own; leave one of the two out"
    if model.attn_implementation not in (None, "sdpa"):
        yield f"{option} with --attn_implementation {model.attn_implementation}; use sdpa"
    if training.micro_batch_tokens:
        yield (
            f"{option} with --micro_batch_tokens {training.micro_batch_tokens}: pieces are whole rows, which no process has; leave "
            "it out, and give fewer rows with --per_device_train_batch_size or --tokens_per_batch"
        )
    if training.loss_average == "rows":
        yield f"{option} with --loss_average rows: no process has all labels of a row; use tokens"
    if training.train_sampling_strategy == "random":
        yield (
            f"{option} with --train_sampling_strategy random, which each process draws for itself; use group_by_length or "
            "sequential"
        )
    for flag in ("torch_compile", "auto_find_batch_size", "neftune_noise_alpha"):
        if getattr(training, flag):
            yield f"{option} with --{flag}, with which it has not been tried; leave one of the two out"
    if not training.average_tokens_across_devices:
        yield f"{option} with --average_tokens_across_devices false: each process has some labels of every row; leave it out"
    yield from _base(option, number, model.model_name_or_path)


def _base(option: str, number: int, name: str) -> Iterator[str]:
    try:
        config = read_config(resolve_base(name))
    except ModelError:
        return  # said where the base is loaded
    family = family_of(config)
    if (why := family.sequence_parallel_refusal(config)) is not None:
        yield f"{option}: {why}; leave it out"
    sizes = family.dimensions(config)
    if sizes.groups % number or sizes.heads % number:
        fits = [n for n in range(2, sizes.groups + 1) if sizes.groups % n == 0 and sizes.heads % n == 0]
        use = f"use {' or '.join(map(str, fits))}" if fits else "leave it out"
        yield (
            f"{option}: each process takes a share of {sizes.heads} heads and {sizes.groups} key/value groups, which {number} "
            f"doesn't divide; {use}"
        )
