"""Will it fit? Memory and disk that a run needs, against what the machine has, said before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptuning.config import Config
from ptuning.errors import ConfigError
from ptuning.language import padded
from ptuning.messages import message
from ptuning.methods import Method, PrefixMethod
from ptuning.quantization import precisions
from ptuning.training.batches import token_batches
from ptuning.training.deepspeed_file import DEFAULT_LIVE_PARAMETERS, ZeroSettings
from ptuning.training.machine import Machine, current_rss, rss_ready_to_train
from ptuning.training.memory import Need, need
from ptuning.training.workload import Workload, positions_of_a_process

# The estimate is within 15 % of measured peaks, so only what is clearly too much is refused; the rest gets a warning.
REFUSE_ABOVE = 1.1
TIGHT_ABOVE = 0.9  # of what is free

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

    @property
    def short(self) -> bool:
        """Whether there is clearly too little memory."""
        return self._memory_above(REFUSE_ABOVE)

    @property
    def tight(self) -> bool:
        """Whether memory may run out."""
        return self._memory_above(TIGHT_ABOVE)

    def _memory_above(self, share: float) -> bool:
        return any(name != DISK and free is not None and size > free * share for name, size, free in self._rows())

    def with_work(self, work: Workload) -> "Estimate":
        """The same machine with another run."""
        return replace(self, work=work, need=need(work, self.process_rss))

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
            other = self.with_work(work)
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
        works = []
        for batch, whole, labels in sampler.shapes(rows[1]):
            length = positions_of_a_process(config.training, whole)
            works.append(replace(work, batch=batch, length=length, labels=min(labels, length)))
        work = max(works, key=lambda each: need(each, 0).device_peak)
    rss = rss_ready_to_train() if work.cpu else current_rss()
    if machine is None:
        machine = Machine.here(config.training.output_dir, "cpu" if work.cpu else "cuda")
        # This node's processes have taken their own share of what was free before they started.
        assert machine.host is not None  # of this machine
        machine = replace(machine, host=machine.host + work.local_processes * rss)
    return Estimate(work, need(work, rss), machine, rss)


def _alternatives(work: Workload) -> Iterator[tuple[list[str], Workload]]:
    """Settings that need less, nearest first: what costs only time, then how the weights are held, then what is tuned."""
    ways: list[tuple[list[str], Workload]] = [([], work)]
    exact = []
    if work.narrow:
        exact, work = ["--kernels fast"], replace(work, narrow=False)
        ways.append((exact, work))
    if work.frozen and work.precision is None and (work.zero is None or work.zero.stage < 3):
        ways += [([*exact, each.option], replace(work, precision=each)) for each in precisions()]
    if not work.cpu and work.precision is None:  # on a CPU the offloaded state lies in the same memory
        for file, zero in SHIPPED.items():
            frees_more = (
                work.zero is None or zero.stage > work.zero.stage or zero.offload_param != work.zero.offload_param
            )
            if frees_more and (work.processes > 1 or zero.offload_optimizer == "cpu"):
                ways.append(([f"--deepspeed {file}"], replace(work, zero=zero)))
    elif work.precision is None and work.processes > 1 and (work.zero is None or work.zero.stage < 3):
        ways.append(([*exact, "--deepspeed configs/zero3.json"], replace(work, zero=SHIPPED["configs/zero3.json"])))
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
    state = "too much" if size > free * REFUSE_ABOVE else "tight" if size > TIGHT_ABOVE * free else "fits"
    return message("judged", free=in_words(free), state=message(state))


def _join(sizes: dict[str, int]) -> str:
    return message("and").join(f"{message(name)} {in_words(size)}" for name, size in sizes.items() if size)


def in_words(size: int) -> str:
    """Bytes in words: `12.5 GB` (10^9), MB below 1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
