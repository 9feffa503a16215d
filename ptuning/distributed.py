"""Process groups: several processes and DeepSpeed, with or without an accelerator, begun and ended in one place.

What is done here and why was measured with deepspeed 0.19, torch 2.13 and two gloo processes.
"""

import contextlib
import importlib
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.errors import ConfigError, PTuningError, TrainingError
from ptuning.messages import message

Value = TypeVar("Value")

# What torch and gloo say when the process at the other end is gone.
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL")


def prepare(argv: Sequence[str]) -> None:
    """Sets the environment before transformers' TrainingArguments make the process group.

    Args:
        argv: all options, those of a --config file included.

    Raises:
        ConfigError: accelerate's own DeepSpeed settings are used instead of a --deepspeed file.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and "--deepspeed" not in argv:
        raise ConfigError(
            "accelerate launch --use_deepspeed brings its own DeepSpeed settings, which this program doesn't read; leave "
            "--use_deepspeed out and give --deepspeed configs/zero3.json"
        )
    choose_deepspeed_device()
    if "--deepspeed" in argv:
        # With `accelerate launch --cpu` transformers would train plain DDP and say nothing.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        if "RANK" not in os.environ:  # started as one process, without a launcher
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})


def choose_deepspeed_device() -> None:
    """Tells DeepSpeed that there is only a CPU; its own guess needs a build tool."""
    if not torch.accelerator.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def free_port() -> int:
    """A TCP port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(deepspeed: bool, timeout_s: float, last_words: Callable[[str], None] = lambda reason: None) -> None:
    """Checks that every process is there and makes DeepSpeed's communication, before any model is built.

    Args:
        deepspeed: a --deepspeed file was given.
        timeout_s: --ddp_timeout, in seconds.
        last_words: is called with the reason when the launcher ends this process with SIGTERM.

    Raises:
        TrainingError: a process doesn't answer; the message names its rank.
    """
    if world_size() > 1:
        signal.signal(signal.SIGTERM, partial(_stopped_by_launcher, last_words))
        host = socket.gethostname()
        ids = {"rank": dist.get_rank(), "processes": world_size(), "pid": os.getpid()}
        print(message("process", **ids, host=host), flush=True)
        wait_for_all_ranks(timedelta(seconds=timeout_s))
    if not deepspeed:
        return
    import deepspeed as ds

    # DeepSpeed calls what torch 2.13 has renamed, hundreds of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.accelerator.is_available():
        ds.init_distributed()
        return
    # `import deepspeed.comm.torch as …` would give torch itself, which that package re-exports.
    ds_torch: Any = importlib.import_module("deepspeed.comm.torch")
    # The shared-memory operator is compiled on first use (28 s), a killed build hangs later ones, and every rank leaves
    # 69 MB in /dev/shm. Private, and without it DeepSpeed uses gloo alone.
    ds_torch.build_shm_op = lambda: None
    ds.init_distributed(dist_backend="gloo")


def wait_for_all_ranks(timeout: timedelta) -> None:
    """Waits for every process and names those that don't come: a plain barrier only says that it timed out.

    Args:
        timeout: how long to wait.

    Raises:
        TrainingError: on rank 0, with the missing ranks; on the others, that rank 0 gave up.
    """
    try:
        # Only gloo can say who is missing; beside NCCL it is a second, small group.
        dist.monitored_barrier(dist.new_group(backend="gloo", timeout=timeout), timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise TrainingError(
            f"not all {world_size()} processes answered within {timeout.total_seconds():g} s (--ddp_timeout): "
            f"{str(error).splitlines()[0]}. Look at that process's output, and at docs/distributed.md."
        ) from error


def check(deepspeed_given: bool, deepspeed_enabled: bool, processes: int) -> None:
    """Holds that the trainer trains what was asked for; the libraries fall back without a word.

    Args:
        deepspeed_given: --deepspeed is among the options.
        deepspeed_enabled: `trainer.is_deepspeed_enabled`.
        processes: the trainer's number of processes.

    Raises:
        TrainingError: DeepSpeed isn't used though it was asked for, or the launcher's processes don't know each other.
    """
    if deepspeed_given and not deepspeed_enabled:
        raise TrainingError(
            "--deepspeed was given, and the trainer would train without it; start with deepspeed or torchrun."
        )
    if launched() != processes or world_size() != processes:
        raise TrainingError(
            f"the launcher started {launched()} processes, the process group has {world_size()} and the trainer {processes}: "
            "they would train unsynchronised copies. Without a GPU give --use_cpu true."
        )


def launched() -> int:
    """Number of processes that the launcher has started, by its environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def raise_together(problem: str | None, device: torch.device, error: type[PTuningError] = TrainingError) -> None:
    """Raises on every process if one has a problem, so that none waits for the others until a timeout.

    Args:
        problem: this process's, None = all is well.
        device: where the process group reduces.
        error: what is raised.

    Raises:
        PTuningError: (of class `error`) with the message of the first process that has one.
    """
    if world_size() > 1:
        flag = torch.tensor([problem is not None], dtype=torch.float32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.item():
            return
        problem = next(text for text in gather_object([problem]) if text is not None)
    if problem is not None:
        raise error(problem)


def is_main() -> bool:
    """Whether this is the first process, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


def of_main_process(value: Value) -> Value:
    """The first process's, on all of them."""
    return value if world_size() == 1 else broadcast_object_list([value])[0]


# --- processes that compute one model together ----------------------------------------------------------------------------

_divided = False
_WITHOUT_END = timedelta(days=3650)


def join() -> bool:
    """Makes the process group of processes that wait for each other as long as a user or client doesn't ask anything. Returns
    whether this is the first process."""
    # Where no accelerator is, accelerate has to be told so, or each process takes itself for the only one.
    PartialState(cpu=not torch.accelerator.is_available(), timeout=_WITHOUT_END)
    return is_main()


def divide() -> None:
    """From now on all processes compute the same rows, each its share of the model."""
    global _divided
    _divided = True


def is_divided() -> bool:
    return _divided


def place_in_rows() -> tuple[int, int]:
    """This process's place among those that rows are divided among, and their number."""
    state = PartialState()
    return (0, 1) if _divided else (state.process_index, state.num_processes)


def from_all(own: list) -> list:
    """What processes that divide rows have found, joined."""
    return own if _divided else gather_object(own)


def own_heads(whole: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """This process's share of keys or values; the whole where it isn't divided.

    Args:
        whole: of all heads.
        heads: that are here.
        dim: the heads'.
    """
    return whole if whole.shape[dim] == heads else whole.narrow(dim, dist.get_rank() * heads, heads)


def most_anywhere(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def anywhere(flag: bool) -> bool:
    """Whether any process says so. All must ask; asked of one process alone it is its own answer."""
    return bool(most_anywhere(int(flag))) if is_deepspeed_zero3_enabled() else flag


@contextlib.contextmanager
def session(say_error: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)) -> Iterator[None]:
    """Ends the process group whatever happens inside, and says in one sentence that another process has died.

    Raises:
        TrainingError: the connection to another process was lost.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if world_size() == 1 or not any(sign in str(error) for sign in _PEER_GONE):
            raise
        raise TrainingError(_lost(str(error).splitlines()[0])) from error
    if world_size() > 1 or dist.is_initialized():
        # Without these about one run in ten aborts after it has succeeded.
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.3)


def _lost(cause: str) -> str:
    return (
        f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)} stops: another process of this run has died "
        f"({cause}). Look above for its message; none means that it was killed, often for lack of memory (dmesg). Continue "
        "with --resume_from_checkpoint true."
    )


def _stopped_by_launcher(last_words: Callable[[str], None], number: int, frame) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reason = "the launcher sent SIGTERM"
    os.write(2, f"error: {_lost(reason)}\n".encode())
    last_words(reason)
    os._exit(128 + number)
