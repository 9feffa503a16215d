"""What the machine has, and what this process itself takes. All figures in bytes."""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ptuning.distributed import choose_deepspeed_device, launched

CGROUP_ROOT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Machine:
    """Free resources of one node.

    Args:
        host: memory that processes on this node can still take, the cgroup's limit included; None: not known.
        disk: free where the checkpoints go; None: not known.
        gpu: free on this process's GPU; None without one.
    """

    host: int | None
    disk: int | None
    gpu: int | None

    @classmethod
    def here(cls, output_dir: str | Path, device_type: str) -> "Machine":
        """This node, now.

        Args:
            output_dir: where checkpoints go; need not exist.
            device_type: "cpu" or "cuda".
        """
        gpu = torch.cuda.mem_get_info(local_rank())[0] if device_type == "cuda" and torch.cuda.is_available() else None
        return cls(available_memory(), free_disk(output_dir), gpu)


def local_rank() -> int:
    """This process's number on its node, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_counts() -> tuple[int, int]:
    """Processes in all and on this node, from the launcher's environment (torchrun: LOCAL_WORLD_SIZE, DeepSpeed: LOCAL_SIZE)."""
    world = launched()
    # DeepSpeed's first: on a CPU accelerate then sets the other one, to 1.
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or str(world)
    return world, min(int(local), world)


def available_memory() -> int:
    """Memory that can still be taken: the smaller of the kernel's figure and what the cgroups leave."""
    left = cgroup_left()
    available = psutil.virtual_memory().available
    return available if left is None else min(available, left)


def cgroup_left(root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the tightest memory cgroup above this process leaves; None where there is no limit.

    A container's limit isn't in /proc/meminfo, which shows the host's memory: the run would be killed without a word.
    Page cache that the kernel can drop counts as free.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None  # not Linux
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = mount / path.lstrip("/")
        # In a container the path can be the host's, and the container's own group is then the mount's root.
        folders = [folder, *folder.parents] if folder.is_dir() else [mount]
        for group in folders:
            if not group.is_relative_to(mount):
                break
            found = _left_in(group, *names)
            left += [found] if found is not None else []
    return min(left, default=None)


def _left_in(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    return max(int(limit) - usage + int(stat.get(cache_name, 0)), 0)


def free_disk(folder: str | Path) -> int:
    """Free bytes where `folder` is or will be."""
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def current_rss() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def peak_rss() -> int:
    """Highest resident memory of this process so far.

    Not getrusage's ru_maxrss where /proc has it: that one starts with what the parent had when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024


def rss_ready_to_train() -> int:
    """Resident memory of this process once all that a run loads besides its data and weights is there.

    Measured, not assumed: imports what the trainer will import and takes one step of a model of a few thousand numbers, which
    makes torch load its kernels and start its autograd threads (85 MB in all on CPU, torch 2.13).
    """
    import matplotlib.pyplot  # noqa: F401  the loss curve

    choose_deepspeed_device()
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  accelerate imports it where it is installed
    from transformers import LlamaConfig, LlamaForCausalLM

    from ptuning.families.logits import loss_of

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=1, **sizes)
    state = torch.random.get_rng_state()
    model = LlamaForCausalLM(config).train()
    torch.random.set_rng_state(state)  # a run's random numbers must not depend on whether it was estimated
    tokens = torch.ones(2, 16, dtype=torch.long)
    loss_of(model, tokens, tokens).backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    return current_rss()
