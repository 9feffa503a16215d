"""Will it fit? Memory and disk that a run needs, against what the machine has, said before any weight is read."""

import math
from dataclasses import dataclass, replace

from ptuning.config import expand_config, parse
from ptuning.config.commands import option, parse_known_options
from ptuning.errors import ConfigError
from ptuning.methods import defaults_of, method_of
from ptuning.training.cards import cards_table
from ptuning.training.checkpointing import choose_checkpointing
from ptuning.training.deepspeed_file import read_deepspeed
from ptuning.training.estimate import estimate_run
from ptuning.training.machine import Machine
from ptuning.training.resume import run_to_continue

_ABOUT = f"{__doc__} Besides these it takes the options of `ptuning train`."


@dataclass(frozen=True)
class EstimateOptions:
    """On what machines."""

    num_gpus: int = option(1, "processes on each node")
    num_nodes: int = option(1, "machines")
    gpu_memory_gb: float | None = option(
        None, "free on each GPU (10^9 bytes) of another machine, of which only what is given here is known"
    )
    host_memory_gb: float | None = option(
        None, "free on each node of another machine; without --gpu_memory_gb one without GPUs"
    )
    disk_gb: float | None = option(None, "free for checkpoints; else this machine's, and another's isn't looked at")
    cards: bool = option(False, "what GPUs of 6 to 80 GB can train, by method and precision of the base")
    # Kept from TrainingArguments, which would make a process group.
    deepspeed: str | None = option(None, "DeepSpeed JSON file")

    def __post_init__(self):
        if self.cards and (self.elsewhere or self.deepspeed is not None or (self.num_gpus, self.num_nodes) != (1, 1)):
            raise ConfigError(
                "--cards is about one GPU of each size without DeepSpeed; leave the other options of estimate out"
            )
        for name in ("num_gpus", "num_nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; use at least 1")
        for name in ("gpu_memory_gb", "host_memory_gb", "disk_gb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"--{name} is {value:g}; use more than 0")

    @property
    def elsewhere(self) -> bool:
        """Whether it is about another machine, so that nothing of this one counts."""
        return self.gpu_memory_gb is not None or self.host_memory_gb is not None

    @property
    def machine(self) -> Machine | None:
        """The other machine; None: this one."""
        return (
            Machine(*map(_bytes, (self.host_memory_gb, self.disk_gb, self.gpu_memory_gb))) if self.elsewhere else None
        )


def _bytes(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)


def estimate_command(argv: list[str]) -> int:
    """`ptuning estimate`: prints the estimate of a run. Returns 0 if it fits and 2 if it doesn't.

    Args:
        argv: the options of `ptuning train`, of which only the model is needed, and those below.

    Raises:
        ConfigError, ModelError: as `estimate_run`.
    """
    own, rest = parse_known_options(EstimateOptions, expand_config(argv), "ptuning estimate", _ABOUT)
    unused = ["--train_file", "-", "--prompt_column", "-", "--response_column", "-", "--output_dir", "."]
    if own.deepspeed is not None and not {"--method", "--pre_seq_len", "--ptuning_checkpoint"} & set(rest):
        rest += ["--method", "full"]  # as a training run takes it
    config, _ = parse(["--do_train", *unused, *rest], defaults=defaults_of)
    method = method_of(config.model, trains=True)
    assert method is not None
    if own.cards:
        print(cards_table(config))
        return 0
    processes = (own.num_gpus * own.num_nodes, own.num_gpus)
    device_type = None
    if own.elsewhere:
        device_type = "cpu" if own.gpu_memory_gb is None else "cuda"
        if not {"--fp16", "--bf16", "--dtype"} & set(rest):  # else what this machine's GPU would choose
            config.training.fp16, config.training.bf16 = False, device_type == "cuda" and not method.keeps_base
    estimate = estimate_run(
        config,
        method,
        own.machine,
        deepspeed=read_deepspeed(own.deepspeed),
        processes=processes,
        device_type=device_type,
    )
    if own.disk_gb is not None:
        estimate = replace(estimate, machine=replace(estimate.machine, disk=_bytes(own.disk_gb)))
    estimate = choose_checkpointing(config.training, run_to_continue(config.training), estimate, print)
    print(estimate)
    estimate.require_fit()
    return 0
