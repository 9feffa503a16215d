"""The figures of a run that decide about its memory, taken from the options and config.json alone. Sizes in numbers, not bytes."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ptuning.checkpoint.base import read_base_config, resolve_base
from ptuning.config import Config
from ptuning.families.chatglm2.config import ChatGLMConfig
from ptuning.loading import resolve_dtype
from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.training.deepspeed_file import ZeroSettings, read_deepspeed
from ptuning.training.machine import process_counts


@dataclass(frozen=True)
class Shape:
    """A model's widths, as in config.json.

    Args:
        layers: L.
        hidden: H.
        query: heads times head dimension.
        key: KV groups times head dimension.
        ffn: F.
        vocab: V.
        heads: query heads.
    """

    layers: int
    hidden: int
    query: int
    key: int
    ffn: int
    vocab: int
    heads: int

    @classmethod
    def of(cls, config: ChatGLMConfig) -> "Shape":
        """From the model's configuration."""
        head = config.head_dim
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            query=config.num_attention_heads * head,
            key=config.num_key_value_heads * head,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            heads=config.num_attention_heads,
        )

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer, biases and norms included."""
        qkv = self.query + 2 * self.key
        return self.hidden * (qkv + self.query + 3 * self.ffn + 2) + qkv

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return self.layers * self.layer_parameters + (2 * self.vocab + 1) * self.hidden


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        shape: of the base.
        prefix: T of a P-Tuning run; None tunes all weights.
        prefix_parameters: numbers in the prefix encoder.
        weight_bytes: a base weight's, as loaded.
        compute_bytes: an activation's.
        autocast: weights stay fp32 and each forward makes 16-bit copies.
        batch: rows a process and step.
        length: tokens of the longest row.
        labels: tokens with a loss in the longest row, at most.
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
    """

    shape: Shape
    prefix: int | None
    prefix_parameters: int
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

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        longest: tuple[int, int] | None = None,
        deepspeed: dict[str, Any] | None = None,
        processes: tuple[int, int] | None = None,
        device_type: str | None = None,
    ) -> "Job":
        """From a run's options; reads config.json, no weights.

        Args:
            config: the options.
            longest: tokens and labels of the longest row; default: what the length options allow.
            deepspeed: instead of the file in the options.
            processes: in all and on this node; default: from the launcher.
            device_type: "cpu" or "cuda"; default: this machine's.

        Raises:
            ModelError: the base can't be used.
            ConfigError: the DeepSpeed file can't be read, or an unknown dtype.
        """
        model, data, training = config.model, config.data, config.training
        folder = resolve_base(model.model_name_or_path)
        read_base_config(folder)
        base = ChatGLMConfig.from_pretrained(folder)
        device_type = device_type or _device_type(training.use_cpu)
        values = deepspeed if deepspeed is not None else read_deepspeed(training.deepspeed)
        prefix = prefix_length(config)
        half = training.bf16 or training.fp16
        dtype = model.dtype
        if dtype == "auto" and prefix is None:
            dtype = "float32"  # see main.build_model
        if dtype == "auto" and device_type == "cuda" and not torch.cuda.is_available():
            dtype = "bfloat16"  # an estimate for another machine
        weight_bytes = resolve_dtype(dtype, torch.device(device_type)).itemsize
        if values is not None and half:
            weight_bytes = 2
        world, local = processes or process_counts()
        longest = longest or (data.max_source_length + data.max_target_length + 1, data.max_target_length + 1)
        if data.pad_to_max_length:
            longest = (data.max_source_length + data.max_target_length + 1, longest[1])
        return cls(
            shape=Shape.of(base),
            prefix=prefix,
            prefix_parameters=_prefix_parameters(PrefixShape.of(base), prefix, model.prefix_projection),
            weight_bytes=weight_bytes,
            compute_bytes=2 if half else weight_bytes,
            autocast=half and weight_bytes == 4,
            batch=training.per_device_train_batch_size,
            length=longest[0],
            labels=longest[1],
            accumulation=training.gradient_accumulation_steps,
            checkpointing=training.gradient_checkpointing,
            eager=model.attn_implementation == "eager",
            optimizer_bytes=2 if "8bit" in str(training.optim) else 8,
            processes=world,
            local_processes=local,
            cpu=device_type == "cpu",
            zero=None if values is None else ZeroSettings.of(values),
            checkpoints=_checkpoints(training),
            save_optimizer=not training.save_only_model,
        )

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return self.shape.parameters if self.prefix is None else self.prefix_parameters

    def with_batch(self, batch: int) -> "Job":
        """The same effective batch with `batch` rows at a time."""
        return replace(self, batch=batch, accumulation=self.accumulation * self.batch // batch)


def prefix_length(config: Config) -> int | None:
    """T of a P-Tuning run, also where a checkpoint says it; None when all weights are tuned."""
    if config.model.pre_seq_len is not None or config.model.ptuning_checkpoint is None:
        return config.model.pre_seq_len
    from ptuning.checkpoint import read_prefix

    return read_prefix(config.model.ptuning_checkpoint).pre_seq_len


def _device_type(use_cpu: bool) -> str:
    return "cpu" if use_cpu or not torch.accelerator.is_available() else "cuda"


def _prefix_parameters(shape: PrefixShape, length: int | None, projection: bool) -> int:
    if length is None:
        return 0
    extra = 2 * shape.width * shape.hidden_size + shape.width + shape.hidden_size if projection else 0
    return length * shape.width + extra


def _checkpoints(training) -> int:
    """Checkpoints on disk at once: those kept and the one being written; where their number isn't known yet, one."""
    if training.save_strategy == "no":
        return 0
    every = training.save_steps
    planned = -(-training.max_steps // int(every)) if training.max_steps > 0 and every >= 1 else None
    limit = training.save_total_limit
    kept = min((n for n in (planned, limit + 1 if limit else None) if n is not None), default=1)
    return max(kept, 1)
