"""The figures of a run that decide about its memory, taken from the options and config.json alone. Sizes in numbers, not bytes."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ptuning.checkpoint.base import base_precision, read_base_config, resolve_base
from ptuning.config import Config, TuningArguments
from ptuning.families import Dimensions, family_of, read_config
from ptuning.kernels import packed_bytes
from ptuning.loading import resolve_dtype
from ptuning.methods import Method
from ptuning.quantization import Precision, asked_precision
from ptuning.training.deepspeed_file import ZeroSettings, read_deepspeed
from ptuning.training.kernels import Kernels, kernels_of, with_gpu_loss
from ptuning.training.machine import process_counts


@dataclass(frozen=True)
class Workload:
    """One training run.

    Args:
        shape: of the base.
        method: what is tuned, in words.
        trained: numbers that are trained.
        frozen: the base gets no gradient, and what is trained lies beside it in fp32.
        positions: extra key/value positions that every token sees.
        inputs: bytes a token that layers keep for what is trained beside them, all layers together.
        weight_bytes: a base weight's, as loaded; where the base is quantised, of what isn't.
        compute_bytes: an activation's.
        autocast: weights stay fp32 and each forward makes 16-bit copies.
        batch: rows a process and step.
        length: tokens of the longest row; of a process's part of it, where rows are divided.
        labels: tokens with a loss among them, at most.
        accumulation: gradient accumulation steps.
        checkpointing: gradient checkpointing.
        eager: attention that keeps every score.
        optimizer_bytes: of optimizer state a trained number; AdamW 8.
        processes: in all.
        local_processes: on this node.
        cpu: trains on the CPU.
        zero: DeepSpeed's settings; None without DeepSpeed.
        checkpoints: kept on disk at the same time, the one being written included.
        save_optimizer: checkpoints hold the optimizer's state.
        precision: of the base's matrices; None: not quantised.
        scale_bytes: of a row's scale there.
        tokens_per_batch: what the batches are filled to; None: they are a number of rows. `batch` and `length` are then those
            of the batch that takes the most, and a row of `longest` tokens is a batch by itself at least.
        longest: tokens of the longest row.
        lean: norms and feed-forward parts keep what the backward pass needs and no more (ptuning.kernels).
        loss_by: what computes the loss without all logits at once, where the output layer lets it; None: nothing does.
        split: attention keeps neither a mask nor repeated keys.
        kept_ffn: numbers that a layer's feed-forward part keeps, in its widths.
        micro_batch_tokens: a batch is taken in pieces of so many tokens at most; 0: in one.
        narrow: the layers' matrices are there once more in bf16, packed for products.
    """

    shape: Dimensions
    method: str
    trained: int
    frozen: bool
    positions: int
    weight_bytes: int
    compute_bytes: int
    autocast: bool
    batch: int
    length: int
    labels: int
    accumulation: int
    checkpointing: bool
    eager: bool
    optimizer_bytes: int
    processes: int
    local_processes: int
    cpu: bool
    zero: ZeroSettings | None
    checkpoints: int
    save_optimizer: bool
    inputs: int = 0
    precision: Precision | None = None
    scale_bytes: int = 2
    tokens_per_batch: int | None = None
    longest: int = 0
    lean: bool = False
    split: bool = False
    kept_ffn: int = 3
    micro_batch_tokens: int = 0
    loss_by: str | None = None
    narrow: bool = False

    @property
    def chunked(self) -> str | None:
        """What computes the loss without all logits at once; None: an output layer that makes its matrix itself has them all, and
        so has DeepSpeed's."""
        return None if self.shape.output_copy or self.zero is not None else self.loss_by

    @property
    def tokens(self) -> int:
        """That are computed at once, at most."""
        whole = self.batch * self.length
        return min(whole, max(self.micro_batch_tokens, self.length)) if self.micro_batch_tokens else whole

    @property
    def rows(self) -> float:
        """Of the longest, that are computed at once."""
        return self.tokens / self.length

    @property
    def accumulates(self) -> bool:
        """Whether there are gradients of an earlier part of the step while another one is computed."""
        return self.accumulation > 1 or self.rows < self.batch

    @property
    def plain_parameters(self) -> int:
        """Numbers of the base that aren't quantised."""
        quantized = 0 if self.precision is None else sum(rows * columns for rows, columns in self.shape.layer_matrices)
        return self.shape.parameters - self.shape.layers * quantized

    @property
    def base_bytes(self) -> int:
        """Memory of the base's weights."""
        stored = 0
        if self.precision is not None:
            stored = sum(self.precision.bytes_of(*each, self.scale_bytes) for each in self.shape.layer_matrices)
        return self.plain_parameters * self.weight_bytes + self.shape.layers * stored

    @property
    def narrow_bytes(self) -> int:
        """Memory of the matrices that are packed in bf16."""
        numbers = sum(rows * columns for rows, columns in self.shape.layer_matrices) if self.narrow else 0
        return packed_bytes(self.shape.layers * numbers)

    @property
    def unpacked_bytes(self) -> int:
        """Of the largest quantised matrix while it is multiplied: its whole numbers and what is made of them, at most fp32."""
        if self.precision is None:
            return 0
        return max(rows * columns for rows, columns in self.shape.layer_matrices) * (1 + 4)

    @classmethod
    def of(
        cls,
        config: Config,
        method: Method,
        *,
        longest: tuple[int, int] | None = None,
        deepspeed: dict[str, Any] | None = None,
        processes: tuple[int, int] | None = None,
        device_type: str | None = None,
        kernels: Kernels | None = None,
    ) -> "Workload":
        """From a run's options; reads config.json, no weights.

        Args:
            config: the options.
            method: what is tuned.
            longest: tokens and labels of the longest row; default: what the length options allow.
            deepspeed: instead of the file in the options.
            processes: in all and on this node; default: from the launcher.
            device_type: "cpu" or "cuda", of another machine; default: this machine's.
            kernels: to train with; default: what the options mean for a new run.

        Raises:
            ModelError: the base can't be used.
            ConfigError: the DeepSpeed file can't be read, or an unknown dtype.
        """
        model, data, training = config.model, config.data, config.training
        folder = resolve_base(model.model_name_or_path)
        read_base_config(folder)
        base = read_config(folder)
        family = family_of(base)
        shape = family.dimensions(base)
        other, device_type = device_type, device_type or _device_type(training.use_cpu)
        values = deepspeed if deepspeed is not None else read_deepspeed(training.deepspeed)
        terms = method.memory(shape)
        if kernels is None:
            zero = values is not None
            kernels = kernels_of(config, method, device_type=device_type, deepspeed=zero)
            kernels = with_gpu_loss(kernels, config, method, device_type=other, deepspeed=zero)
        half = training.bf16 or training.fp16
        dtype = base_dtype(model.dtype, method, trains=True)
        if dtype == "auto" and device_type == "cuda":
            dtype = "bfloat16"  # or float16, which is as long; this machine may have no GPU to ask
        weight_bytes = resolve_dtype(dtype, torch.device(device_type)).itemsize
        if values is not None and half:
            weight_bytes = 2
        world, local = processes or process_counts()
        longest = longest or (data.max_source_length + data.max_target_length + 1, data.max_target_length + 1)
        if data.pad_to_max_length:
            longest = (data.max_source_length + data.max_target_length + 1, longest[1])
        length = positions_of_a_process(training, longest[0])
        return cls(
            shape=shape,
            method=method.describe(),
            trained=terms.trained,
            frozen=terms.frozen_base,
            positions=terms.positions,
            weight_bytes=weight_bytes,
            compute_bytes=2 if half else weight_bytes,
            autocast=half and weight_bytes == 4,
            batch=_rows_of_a_batch(training, longest[0]),
            length=length,
            labels=min(longest[1], length),
            accumulation=training.gradient_accumulation_steps,
            checkpointing=bool(training.gradient_checkpointing),
            eager=model.attn_implementation == "eager",
            optimizer_bytes=2 if "8bit" in str(training.optim) else 8,
            processes=world,
            local_processes=local,
            cpu=device_type == "cpu",
            zero=None if values is None else ZeroSettings.of(values),
            checkpoints=_checkpoints(training),
            save_optimizer=not training.save_only_model,
            precision=base_precision(folder, asked_precision(model)),
            inputs=4 * terms.inputs + (4 if device_type == "cpu" else 1) * terms.dropped,  # CUDA's masks are bytes
            tokens_per_batch=training.tokens_per_batch,
            longest=longest[0],
            lean=kernels.fast,
            split=kernels.fast and model.attn_implementation in (None, "sdpa") and not shape.score_bias,
            kept_ffn=2 if kernels.fast and family.feed_forward and family.gates_with_silu(base) else 3,
            micro_batch_tokens=kernels.micro_batch_tokens,
            loss_by=kernels.loss,
            narrow=kernels.narrow,
        )

    def with_batch(self, batch: int) -> "Workload":
        """The same effective batch with `batch` rows at a time."""
        tokens = None if self.tokens_per_batch is None else self.tokens_per_batch * batch // self.batch
        accumulation = self.accumulation * self.batch // batch
        return replace(self, batch=batch, tokens_per_batch=tokens, accumulation=accumulation)


def positions_of_a_process(training: TuningArguments, length: int) -> int:
    """Of a row with so many tokens."""
    return -(-length // (training.sequence_parallel or 1))


def _rows_of_a_batch(training: TuningArguments, length: int) -> int:
    """Of rows as long as the longest."""
    tokens = training.tokens_per_batch
    return training.per_device_train_batch_size if tokens is None else max(tokens // length, 1)


def base_dtype(dtype: str, method: Method | None, trains: bool) -> str:
    """The --dtype to load the base in: where its own weights are trained they are the optimizer's fp32 master weights, and
    bf16 or fp16 autocast does the computing."""
    return "float32" if dtype == "auto" and trains and method is not None and not method.keeps_base else dtype


def _device_type(use_cpu: bool) -> str:
    return "cpu" if use_cpu or not torch.accelerator.is_available() else "cuda"


def _checkpoints(training) -> int:
    """Checkpoints on disk at once: those kept and the one being written; where their number isn't known yet, one."""
    if training.save_strategy == "no":
        return 0
    every = training.save_steps
    planned = -(-training.max_steps // int(every)) if training.max_steps > 0 and every >= 1 else None
    limit = training.save_total_limit
    kept = min((n for n in (planned, limit + 1 if limit else None) if n is not None), default=1)
    return max(kept, 1)
