"""How many bytes a run needs at its peak, by arithmetic. Checked against measured peaks in tests/training/test_estimate.py.

Letters: H hidden, Q heads times head dimension, K groups times head dimension, F feed-forward width, V vocabulary, T prefix.
"""

from dataclasses import dataclass

from ptuning.kernels import momentary_bytes
from ptuning.training.workload import Workload

CUDA_CONTEXT = 600 << 20  # kernels and handles on the GPU; not measured here
CUDA_HOST = 1 << 30  # of host memory that CUDA takes a process; not measured here
# Of the activations, what torch's caching allocator holds back on a GPU; not measured here.
ALLOCATOR_SLACK = 0.1
# glibc's malloc keeps freed blocks up to 32 MB (its largest mmap threshold) in a heap with holes. Measured: 1.1 to 4 times what
# comes and goes with each layer, with and without gradient checkpointing; one run in four takes much more than the others.
HEAP_SLACK, HEAP_BLOCK = 1.6, 32 << 20
HEAP_SLACK_LEAN = 2.3  # kernels that keep less, and parts of a batch, have blocks of changing sizes: more holes
HEAP_SLACK_BESIDE = 3.0  # so have small matrices that train beside a layer


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


def need(work: Workload, process_rss: int) -> Need:
    """The memory that a run takes.

    Args:
        process_rss: bytes that a process takes without data and weights.
    """
    fixed, gradients, step, host = _states(work)
    if work.cpu:  # offloaded or not, the step's copies lie where the activations were before it
        step += host.pop("optimizer step", 0)
    momentary = _momentary(work) + work.unpacked_bytes
    acting, passing = activations(work) + momentary, layer_activations(work) + momentary
    slack = ALLOCATOR_SLACK * acting
    if work.cpu and work.tokens * 2 * work.shape.ffn * work.compute_bytes <= HEAP_BLOCK:
        lean = work.lean or work.rows < work.batch
        slack = passing * (HEAP_SLACK_BESIDE if work.inputs else HEAP_SLACK_LEAN if lean else HEAP_SLACK)
        if work.zero is not None and work.zero.stage == 3:
            # Gathered weights and whole gradients come and go in small blocks too; measured: as much again as both.
            slack += (work.shape.parameters + work.trained) * work.weight_bytes
    # In the backward pass activations go as gradients come. Only what accumulates over micro batches meets both at once.
    # Under stage 3 the gradients' partition is one buffer that is never given back.
    resting = gradients if work.accumulates or (work.zero is not None and work.zero.stage == 3) else 0
    dynamic = int(max(acting + resting, gradients + passing, gradients + step) + slack)
    device = fixed | {"gradients": gradients, "activations": acting}
    peak = sum(fixed.values()) + dynamic
    local = work.local_processes
    if work.cpu:
        everything = {"processes": local * process_rss, "training": local * (peak + sum(host.values()))}
        return Need(device, peak, everything, _disk(work))
    peak += CUDA_CONTEXT
    device["CUDA context"] = CUDA_CONTEXT
    hosted = {"processes": local * (process_rss + CUDA_HOST)} | {name: local * size for name, size in host.items()}
    return Need(device, peak, hosted, _disk(work))


def activations(work: Workload) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    Counted tensor by tensor with torch's saved-tensor hooks (test_estimate.py holds it to 2 %).
    """
    s, tokens = work.shape, work.tokens
    kept = (
        s.layers * s.hidden * tokens * _residual_bytes(work)
        if work.checkpointing
        else s.layers * layer_activations(work)
    )
    kept += s.hidden * tokens * _norm_bytes(work)  # final norm
    # the log softmax; or, of a loss in chunks, the gradient that comes with it
    kept += _labels(work) * (s.vocab * 4 if work.chunked is None else s.hidden * work.compute_bytes)
    if not work.frozen:  # inputs of the final norm's weight and of the output layer
        kept += s.hidden * (tokens * _residual_bytes(work) + _labels(work) * work.compute_bytes)
    if work.checkpointing:
        kept += layer_activations(work)
    if s.output_copy:
        kept += s.vocab * s.hidden * work.compute_bytes
    if s.score_bias:  # one mask for all layers and rows
        kept += s.heads * work.length * (work.length + work.positions) * work.compute_bytes
    if work.frozen and not work.checkpointing:
        kept -= (
            s.hidden * tokens * _norm_bytes(work)
        )  # the first norm's input is the embedding, which needs no gradient
    if work.frozen:
        # every row has a dropout mask of its own on the prefix; checkpointing, and an attention that leaves the prefix apart, keep
        # what the layers were given, too
        times = 2 if work.checkpointing or work.split else 1
        kept += int(work.rows * work.positions) * s.layers * 2 * s.key * work.compute_bytes * times
    return int(kept)


def layer_activations(work: Workload) -> int:
    """Bytes that one layer keeps: inputs of the norms, query, output, keys, values, and the feed-forward part."""
    s, c = work.shape, work.compute_bytes
    seen = work.length + work.positions
    token: float = 2 * s.hidden * _norm_bytes(work) + (2 * s.query + work.kept_ffn * s.ffn) * c
    # with a prefix and a mask keys and values are repeated for every query head
    token += 2 * s.query * c * seen / work.length if work.positions and not work.split else 2 * s.key * c
    if work.eager:
        token += s.heads * seen * (4 + c)
    if not work.frozen:
        # What frozen weights don't need: the inputs of each product, for the weights' gradients
        token += (2 * s.hidden + s.query + s.ffn) * c + 2 * s.hidden * _residual_bytes(work)
    return int((token + work.inputs / s.layers) * work.tokens)


def _norm_bytes(work: Workload) -> int:
    """Of a number that a norm keeps; transformers' own compute in fp32."""
    return _residual_bytes(work) if work.lean else 4


def _labels(work: Workload) -> int:
    """Whose logits are computed at once, at most."""
    return int(work.rows * work.labels)


def _residual_bytes(work: Workload) -> int:
    return 4 if work.autocast else work.compute_bytes


def _momentary(work: Workload) -> int:
    """What lives for an instant on top of the kept activations: the logits and their gradient, or a layer's gradients."""
    s, c = work.shape, work.compute_bytes
    if work.chunked is None:
        logits = _labels(work) * s.vocab * (4 if c == 4 else 4 + c)
    else:
        logits = momentary_bytes(work.chunked, _labels(work), s.hidden, s.vocab, c)
    # what is trained beside a layer has gradients of its inputs too
    layer = work.tokens * ((5 * s.ffn + 4 * s.hidden) * c + work.inputs / s.layers)
    return int(max(logits, layer))


def _states(work: Workload) -> tuple[dict[str, int], int, int, dict[str, int]]:
    """Weights, optimizer and buffers; gradients; what the optimizer's step adds; and what lies in host memory."""
    total, trained, n, zero = work.shape.parameters, work.trained, work.processes, work.zero
    base = work.base_bytes
    if zero is None:
        one = 4 if work.frozen else work.weight_bytes
        fixed = {
            "weights": base + (4 * trained if work.frozen else 0),
            "16-bit copies": work.narrow_bytes + (2 * work.plain_parameters if work.autocast else 0),
            "optimizer": trained * work.optimizer_bytes * one // 4,
            "DDP buckets": one * trained if n > 1 else 0,
        }
        return {name: size for name, size in fixed.items() if size}, one * trained, 0, {}

    def share(stage: int) -> int:
        return n if zero.stage >= stage else 1

    w = work.weight_bytes
    weights = (base + (w * trained if work.frozen else 0)) // share(3)
    bucket = min(zero.bucket or work.shape.hidden**2, trained)
    fixed = {
        "gathered weights": min(total, zero.live_parameters) * w if zero.stage == 3 else 0,
        "reduce buckets": 2 * bucket * w,
    }
    host: dict[str, int] = {}
    where = host if zero.offload_param != "none" else fixed
    where["weights"] = weights if zero.offload_param != "nvme" else 5 * 100_000_000 * w  # DeepSpeed's default buffers
    states = (4 + work.optimizer_bytes) * trained // share(1)  # fp32 master weights and the optimizer's own
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


def _disk(work: Workload) -> dict[str, int]:
    total, trained, zero, w = work.shape.parameters, work.trained, work.zero, work.weight_bytes
    model = 4 * trained if work.frozen else w * total
    one = model
    if work.save_optimizer:
        one += work.optimizer_bytes * trained
        if zero is not None:
            one += 4 * trained  # fp32 master weights
            one += w * total if zero.stage < 3 or work.frozen else 0  # DeepSpeed's own copy of the model
    disk = {"checkpoints": work.checkpoints * one, "tuned model": model}
    if zero is not None and zero.offload_optimizer == "nvme":
        disk["NVMe optimizer"] = (4 + work.optimizer_bytes) * trained
    if zero is not None and zero.offload_param == "nvme":
        disk["NVMe weights"] = w * total
    return disk
