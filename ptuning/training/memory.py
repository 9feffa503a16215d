"""How many bytes a run needs at its peak, by arithmetic. Checked against measured peaks in tests/training/test_estimate.py.

Letters: H hidden, Q heads times head dimension, K groups times head dimension, F feed-forward width, V vocabulary, T prefix.
"""

from dataclasses import dataclass

from ptuning.training.job import Job

CUDA_CONTEXT = 600 << 20  # kernels and handles on the GPU; not measured here
CUDA_HOST = 1 << 30  # of host memory that CUDA takes a process; not measured here
# Of the activations, what torch's caching allocator holds back on a GPU; not measured here.
ALLOCATOR_SLACK = 0.1
# glibc's malloc keeps freed blocks up to 32 MB (its largest mmap threshold) in a heap with holes. Measured: 1.1 to 2.3 times
# what comes and goes with each layer, with and without gradient checkpointing.
HEAP_SLACK, HEAP_BLOCK = 1.6, 32 << 20


@dataclass(frozen=True)
class Need:
    """Bytes at the peak.

    Args:
        device: what, and how much of it on each GPU (on CPU: in each process's memory). "gradients" and "activations" are
            not all there at the same time; `device_peak` is what counts.
        device_peak: of one process.
        host: what, and how much of it in one node's memory, all its processes together.
        disk: for checkpoints (and swapped state), all nodes together.
    """

    device: dict[str, int]
    device_peak: int
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())

    @property
    def disk_peak(self) -> int:
        return sum(self.disk.values())


def need(job: Job, process_rss: int) -> Need:
    """The memory that a run takes.

    Args:
        process_rss: bytes that a process takes without data and weights.
    """
    fixed, gradients, step, host = _states(job)
    acting, passing = activations(job) + _momentary(job), layer_activations(job) + _momentary(job)
    slack = ALLOCATOR_SLACK * acting
    if job.cpu and job.batch * job.length * 2 * job.shape.ffn * job.compute_bytes <= HEAP_BLOCK:
        slack = HEAP_SLACK * passing
        if job.zero is not None and job.zero.stage == 3:
            # Gathered weights and whole gradients come and go in small blocks too; measured: as much again as both.
            slack += (job.shape.parameters + job.trained) * job.weight_bytes
    # In the backward pass activations go as gradients come. Only what accumulates over micro batches meets both at once.
    # Under stage 3 the gradients' partition is one buffer that is never given back.
    resting = gradients if job.accumulation > 1 or (job.zero is not None and job.zero.stage == 3) else 0
    dynamic = int(max(acting + resting, gradients + passing, gradients + step) + slack)
    device = fixed | {"gradients": gradients, "activations": acting}
    peak = sum(fixed.values()) + dynamic
    local = job.local_processes
    if job.cpu:
        everything = {"processes": local * process_rss, "training": local * (peak + sum(host.values()))}
        return Need(device, peak, everything, _disk(job))
    peak += CUDA_CONTEXT
    device["CUDA context"] = CUDA_CONTEXT
    hosted = {"processes": local * (process_rss + CUDA_HOST)} | {name: local * size for name, size in host.items()}
    return Need(device, peak, hosted, _disk(job))


def activations(job: Job) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    Counted tensor by tensor with torch's saved-tensor hooks (test_estimate.py holds it to 2 %).
    """
    s, tokens = job.shape, job.batch * job.length
    kept = (
        s.layers * s.hidden * tokens * _residual_bytes(job) if job.checkpointing else s.layers * layer_activations(job)
    )
    kept += s.hidden * tokens * 4  # final norm
    kept += job.batch * job.labels * s.vocab * 4  # log softmax
    if job.prefix is None:  # inputs of the final norm's weight and of the output layer
        kept += s.hidden * (tokens * _residual_bytes(job) + job.batch * job.labels * job.compute_bytes)
    if job.checkpointing:
        kept += layer_activations(job)
    if job.prefix is not None:
        # every row has a dropout mask of its own on the prefix, and checkpointing keeps what the layers were given
        kept += job.batch * job.prefix * s.layers * 2 * s.key * job.compute_bytes * (2 if job.checkpointing else 1)
    return int(kept)


def layer_activations(job: Job) -> int:
    """Bytes that one layer keeps: inputs of the norms in fp32, query, output, keys, values, and the feed-forward part."""
    s, c = job.shape, job.compute_bytes
    seen = job.length + (job.prefix or 0)
    token = 2 * s.hidden * 4 + (2 * s.query + 3 * s.ffn) * c
    # with a prefix there is a mask, and keys and values are repeated for every query head
    token += 2 * s.query * c * seen / job.length if job.prefix else 2 * s.key * c
    if job.eager:
        token += s.heads * seen * (4 + c)
    if job.prefix is None:
        # What frozen weights don't need: the inputs of each product, for the weights' gradients
        token += (2 * s.hidden + s.query + s.ffn) * c + 2 * s.hidden * _residual_bytes(job)
    return int(token * job.batch * job.length)


def _residual_bytes(job: Job) -> int:
    return 4 if job.autocast else job.compute_bytes


def _momentary(job: Job) -> int:
    """What lives for an instant on top of the kept activations: the logits' gradient, or a layer's gradients."""
    s, c = job.shape, job.compute_bytes
    logits = job.batch * job.labels * s.vocab * (4 if c == 4 else 4 + c)
    layer = job.batch * job.length * (5 * s.ffn + 4 * s.hidden) * c
    return max(logits, layer)


def _states(job: Job) -> tuple[dict[str, int], int, int, dict[str, int]]:
    """Weights, optimizer and buffers; gradients; what the optimizer's step adds; and what lies in host memory."""
    total, trained, n, zero = job.shape.parameters, job.trained, job.processes, job.zero
    base = total * job.weight_bytes
    if zero is None:
        one = 4 if job.prefix is not None else job.weight_bytes
        fixed = {
            "weights": base + (4 * trained if job.prefix is not None else 0),
            "16-bit copies": 2 * total if job.autocast else 0,
            "optimizer": trained * job.optimizer_bytes * one // 4,
            "DDP buckets": one * trained if n > 1 else 0,
        }
        return {name: size for name, size in fixed.items() if size}, one * trained, 0, {}

    def share(stage: int) -> int:
        return n if zero.stage >= stage else 1

    w = job.weight_bytes
    weights = (base + (w * trained if job.prefix is not None else 0)) // share(3)
    bucket = min(zero.bucket or job.shape.hidden**2, trained)
    fixed = {
        "gathered weights": min(total, zero.live_parameters) * w if zero.stage == 3 else 0,
        "reduce buckets": 2 * bucket * w,
    }
    host = {}
    where = host if zero.offload_param != "none" else fixed
    where["weights"] = weights if zero.offload_param != "nvme" else 5 * 100_000_000 * w  # DeepSpeed's default buffers
    states = (4 + job.optimizer_bytes) * trained // share(1)  # fp32 master weights and the optimizer's own
    gradients = w * trained // share(2)
    # The step takes fp32 copies of the gradients, and torch's AdamW makes two more of that size (DeepSpeed's own kernels make
    # none): of the whole partition, and under stage 3 of one sub-group at a time.
    part = trained // share(1)
    at_once = min(part, zero.sub_group) if zero.stage == 3 else part
    step = (4 * at_once if w == 2 else 0) + (8 * at_once if zero.torch_adam else 0)
    if zero.offload_optimizer == "none":
        fixed["optimizer"] = states
    elif zero.offload_optimizer == "cpu":
        # the gradients go there too, as they come and once more in fp32
        host["optimizer"], host["gradients"] = states, (4 + w) * part
        host["optimizer step"] = 8 * at_once if zero.torch_adam else 0
        gradients = step = 0
    else:
        host["optimizer buffers"] = 4 * 4 * 4 * at_once  # buffer_count 4: weight, gradient and two moments
        host["gradients"] = w * part
        gradients = step = 0
    return {name: size for name, size in fixed.items() if size}, gradients, step, host


def _disk(job: Job) -> dict[str, int]:
    total, trained, zero, w = job.shape.parameters, job.trained, job.zero, job.weight_bytes
    model = 4 * trained if job.prefix is not None else w * total
    one = model
    if job.save_optimizer:
        one += job.optimizer_bytes * trained
        if zero is not None:
            one += 4 * trained  # fp32 master weights
            one += w * total if zero.stage < 3 or job.prefix is not None else 0  # DeepSpeed's own copy of the model
    disk = {"checkpoints": job.checkpoints * one, "tuned model": model}
    if zero is not None and zero.offload_optimizer == "nvme":
        disk["NVMe optimizer"] = (4 + job.optimizer_bytes) * trained
    if zero is not None and zero.offload_param == "nvme":
        disk["NVMe weights"] = w * total
    return disk
