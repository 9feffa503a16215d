"""Will it fit? Memory and disk that a run needs, against what the machine has, said before any weight is read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptuning.config import Config, expand_config, parse
from ptuning.config.commands import option, parse_known_options
from ptuning.errors import ConfigError
from ptuning.language import padded
from ptuning.messages import message
from ptuning.methods import Method, PrefixMethod, defaults_of, method_of
from ptuning.quantization import precisions
from ptuning.training.batches import token_batches
from ptuning.training.cards import cards_table
from ptuning.training.deepspeed_file import DEFAULT_LIVE_PARAMETERS, ZeroSettings, read_deepspeed
from ptuning.training.machine import Machine, current_rss, rss_ready_to_train
from ptuning.training.memory import Need, need
from ptuning.training.workload import Workload

# The estimate is within 15 % of measured peaks, so only what is clearly too much is refused; the rest gets a warning.
REFUSE_ABOVE = 1.1

GPU, HOST, DISK = "memory per GPU", "host memory per node", "disk for checkpoints"
_FLAGS = {GPU: "--gpu_memory_gb", HOST: "--host_memory_gb", DISK: "--disk_gb"}

SHIPPED = {
    "configs/zero2.json": ZeroSettings(2, bucket=200_000_000, torch_adam=True),
    "configs/zero3.json": ZeroSettings(3, live_parameters=DEFAULT_LIVE_PARAMETERS, torch_adam=True),
    "configs/zero3_offload.json": ZeroSettings(3, "cpu", "cpu", torch_adam=True),
}


@dataclass(frozen=True)
class Estimate:
    """What a run needs and what there is. `str()` is the table to print.

    Args:
        work: the run.
        need: its peak.
        machine: what is free.
        process_rss: bytes of a process without data and weights, measured in this one.
    """

    work: Workload
    need: Need
    machine: Machine
    process_rss: int

    @property
    def lacking(self) -> list[str]:
        """What clearly doesn't fit, one sentence each."""
        return [
            f"{name} {in_words(size)} of {in_words(free)} free"
            for name, size, free in self._rows()
            if free is not None and size > free * REFUSE_ABOVE
        ]

    def require_fit(self) -> None:
        """Raises ConfigError where the run can't fit, naming the nearest setting that would."""
        lacking = self.lacking
        if lacking:
            raise ConfigError(f"this run can't fit: it needs {', and '.join(lacking)}. {self._advice()}")

    def _rows(self) -> Iterator[tuple[str, int, int | None]]:
        if self.machine.gpu is not None:
            yield GPU, self.need.device_peak, self.machine.gpu
        yield HOST, self.need.host_peak, self.machine.host
        yield DISK, self.need.disk_peak, self.machine.disk

    def __str__(self) -> str:
        work, lines = self.work, [_describe(self.work)]
        parts = {
            GPU: self.need.device,
            HOST: self.need.host if not work.cpu else self._cpu_parts(),
            DISK: self.need.disk,
        }
        for name, size, free in self._rows():
            judged = _judged(name, size, free)
            label = padded(message(name), 21)
            lines.append(message("need", name=label, size=in_words(size), judged=judged, parts=_join(parts[name])))
        return "\n".join(lines)

    def _cpu_parts(self) -> dict[str, int]:
        local = self.work.local_processes
        sizes = {"processes": self.process_rss} | self.need.device
        return {name: local * size for name, size in sizes.items()}

    def _advice(self) -> str:
        if [sentence.startswith(DISK) for sentence in self.lacking] == [True]:
            return self._disk_advice()
        for flags, work in _alternatives(self.work):
            other = replace(self, work=work, need=need(work, self.process_rss))
            if not any(name != DISK and free is not None and size > free for name, size, free in other._rows()):
                peak = other.need.host_peak if other.machine.gpu is None else other.need.device_peak
                where = "host memory" if other.machine.gpu is None else "a GPU"
                return f"The nearest setting that fits: {' '.join(flags)} (about {in_words(peak)} of {where})."
        smallest = min(need(work, self.process_rss).host_peak for _, work in _alternatives(self.work))
        return (
            f"No setting fits; the smallest found still needs {in_words(smallest)} "
            "of host memory per node. More GPUs or nodes divide it (--num_gpus), or tune a smaller model."
        )

    def _disk_advice(self) -> str:
        weights_only = "--save_only_model true (such a run can't be resumed)"
        for flags, checkpoints, optimizer in (
            ("--save_total_limit 1", 2, self.work.save_optimizer),
            (f"--save_total_limit 1 {weights_only}", 2, False),
            ("--save_strategy no (only the tuned model at the end)", 0, self.work.save_optimizer),
        ):
            assert self.machine.disk is not None  # it was found to be too small
            changed = replace(self.work, checkpoints=checkpoints, save_optimizer=optimizer)
            if changed.checkpoints <= self.work.checkpoints and need(changed, 0).disk_peak <= self.machine.disk:
                return f"The nearest setting that fits: {flags}; or another disk with --output_dir."
        return "Free some space or choose another disk with --output_dir."


def estimate_run(
    config: Config,
    method: Method,
    machine: Machine | None = None,
    rows: tuple[np.ndarray, np.ndarray] | None = None,
    **figures,
) -> Estimate:
    """The estimate for a run, from its options and config.json. Reads no weights.

    Args:
        config: the options.
        method: what is tuned.
        machine: what is free; default: this one.
        rows: lengths and numbers of labels of the training rows; default: what the length options allow.
        **figures: of `Workload.of`.

    Raises:
        ModelError, ConfigError: as `Workload.of`. Whether it fits is asked with `require_fit`.
    """
    if rows is not None:
        figures["longest"] = (int(rows[0].max()), int(rows[1].max()))
    work = Workload.of(config, method, **figures)
    if rows is not None and (sampler := token_batches(config.training, rows[0])) is not None:
        # Many short rows can take more than few long ones: each has its own keys and values of the prefix.
        shapes = sampler.shapes(rows[1])
        works = [replace(work, batch=batch, length=length, labels=labels) for batch, length, labels in shapes]
        work = max(works, key=lambda each: need(each, 0).device_peak)
    rss = rss_ready_to_train() if work.cpu else current_rss()
    if machine is None:
        machine = Machine.here(config.training.output_dir, "cpu" if work.cpu else "cuda")
        # This node's processes have taken their own share of what was free before they started.
        assert machine.host is not None  # of this machine
        machine = replace(machine, host=machine.host + work.local_processes * rss)
    return Estimate(work, need(work, rss), machine, rss)


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
    print(estimate)
    estimate.require_fit()
    return 0


def _alternatives(work: Workload) -> Iterator[tuple[list[str], Workload]]:
    """Settings that need less, nearest first: what costs only time, then how the weights are held, then what is tuned."""
    ways: list[tuple[list[str], Workload]] = [([], work)]
    if work.frozen and work.precision is None and (work.zero is None or work.zero.stage < 3):
        ways += [([each.option], replace(work, precision=each)) for each in precisions()]
    if not work.cpu and work.precision is None:  # on a CPU the offloaded state lies in the same memory
        for file, zero in SHIPPED.items():
            frees_more = (
                work.zero is None or zero.stage > work.zero.stage or zero.offload_param != work.zero.offload_param
            )
            if frees_more and (work.processes > 1 or zero.offload_optimizer == "cpu"):
                ways.append(([f"--deepspeed {file}"], replace(work, zero=zero)))
    elif work.precision is None and work.processes > 1 and (work.zero is None or work.zero.stage < 3):
        ways.append((["--deepspeed configs/zero3.json"], replace(work, zero=SHIPPED["configs/zero3.json"])))
    for flags, way in ways:
        if flags:
            yield flags, way
        for more, cheaper in _slower(way):
            yield [*flags, *more], cheaper
    if not work.frozen:
        prefix = PrefixMethod(128)
        terms = prefix.memory(work.shape)
        for more, cheaper in (([], work), *_slower(work)):
            frozen = replace(cheaper, weight_bytes=work.compute_bytes, autocast=False, zero=None)
            tuned: dict[str, Any] = {
                "method": prefix.describe(),
                "trained": terms.trained,
                "positions": terms.positions,
            }
            yield ["--method prefix --pre_seq_len 128", *more], replace(frozen, frozen=True, **tuned)


def _slower(work: Workload) -> Iterator[tuple[list[str], Workload]]:
    """The same run with less memory and more time."""
    checkpointing = [] if work.checkpointing else ["--gradient_checkpointing true"]
    if checkpointing:
        yield checkpointing, replace(work, checkpointing=True)
    batch = work.batch
    while batch > 1:
        batch = next(n for n in range(batch // 2, 0, -1) if work.batch % n == 0)  # keeps the effective batch
        smaller = work.with_batch(batch)
        if smaller.tokens_per_batch is not None and smaller.tokens_per_batch < work.longest:
            break  # the longest row alone is more than that
        flags = [_batch_flags(smaller)]
        yield flags, smaller
        if checkpointing:
            yield [*checkpointing, *flags], replace(smaller, checkpointing=True)


def _batch_flags(work: Workload) -> str:
    accumulation = f"--gradient_accumulation_steps {work.accumulation}"
    if work.tokens_per_batch is not None:
        return f"--tokens_per_batch {work.tokens_per_batch} {accumulation}"
    return f"--per_device_train_batch_size {work.batch} {accumulation}"


def _describe(work: Workload) -> str:
    zero = work.zero
    how = message("no_deepspeed") if zero is None else f"ZeRO-{zero.stage}"
    if zero is not None and zero.offload_optimizer != "none":
        how += message("offload", device=zero.offload_optimizer)
    return message(
        "estimate",
        method=work.method,
        parameters=work.shape.parameters / 1e9,
        precision="" if work.precision is None else message("in_precision", name=work.precision.name),
        processes=work.processes,
        es="es" * (work.processes > 1),
        local=work.local_processes,
        how=how,
        batch=work.batch,
        length=work.length,
        checkpointing=message("on" if work.checkpointing else "off"),
    )


def _judged(name: str, size: int, free: int | None) -> str:
    if free is None:
        return message("not_told", flag=_FLAGS[name])
    state = "too much" if size > free * REFUSE_ABOVE else "tight" if size > 0.9 * free else "fits"
    return message("judged", free=in_words(free), state=message(state))


def _join(sizes: dict[str, int]) -> str:
    return message("and").join(f"{message(name)} {in_words(size)}" for name, size in sizes.items() if size)


def in_words(size: int) -> str:
    """Bytes in words: `12.5 GB` (10^9), MB below 1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
