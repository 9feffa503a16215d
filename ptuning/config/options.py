"""Every option, declared once. Flags and YAML keys are the same names; flags override the file.

The official scripts' flags keep their meaning (THUDM/ChatGLM2-6B `ptuning/arguments.py`), and all of transformers'
TrainingArguments are there.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ptuning.config import shipped
from ptuning.errors import ConfigError

DATASET = "dataset:"  # in front of NAME:SPLIT, where a file could stand: a split of a dataset of the hub


@dataclass
class ModelArguments:
    """Which model, and what of it is tuned."""

    model_name_or_path: str = field(
        metadata={"help": "Folder in a family's official format, hub id, or modelscope:OWNER/NAME."}
    )
    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Prefix or LoRA to load (ours, official or peft folder): to evaluate it, or with --do_train to start a NEW run "
            "from it (new optimizer and data order; to continue a run use --resume_from_checkpoint)."
        },
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": "prefix (default): a learned prefix on a frozen model; lora: low-rank factors beside its layers; "
            "full: all weights. --deepspeed without --pre_seq_len, "
            "as in the official ds_train_finetune.sh, means full."
        },
    )
    pre_seq_len: int | None = field(default=None, metadata={"help": "Length of the prefix; default: 128."})
    prefix_projection: bool = field(default=False, metadata={"help": "Reparametrise the prefix with a two-layer MLP."})
    fold_projection: bool = field(
        default=False,
        metadata={
            "help": "Save the prefix that the projection computes, plain, instead of the projection (checkpoints keep it)."
        },
    )
    prefix_dropout: float = field(
        default=0.1, metadata={"help": "Dropout on the prefix keys and values while training; official: 0.1."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Width of a LoRA's factors; default: 8."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "A LoRA's product is scaled by lora_alpha / lora_rank; default: 32."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout on what goes into a LoRA while training; default: 0.1."}
    )
    lora_target: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which layers get a LoRA: all (default), attention, or names: q_proj v_proj …; also those of official files, "
            "e.g. query_key_value."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: a LoRA with a learned length for each output."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / √lora_rank, for large ranks."})
    lora_init: str | None = field(
        default=None, metadata={"help": "How a LoRA starts: default (Kaiming and zeros), gaussian or orthogonal."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the base: auto (fp32 on CPU, bf16 or fp16 on a GPU), float32, …"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), eager, flex_attention or flash_attention_2."}
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "auto: the base's layers are divided among this process's GPUs, for answers.",
            "choices": ["auto"],
        },
    )
    tensor_parallel: int | None = field(
        default=None,
        metadata={
            "help": "Divide the base's matrices among the N processes of torchrun --nproc-per-node N, for answers."
        },
    )
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "8 or 4: quantise the base as it is read; an official int8 or int4 folder needs none."},
    )
    quantization: str | None = field(
        default=None, metadata={"help": "nf4: quantise the base as it is read, by bitsandbytes (QLoRA)."}
    )
    double_quantization: bool = field(
        default=False, metadata={"help": "With --quantization nf4: its scales in 8 bit, 0.37 bit less a weight."}
    )
    cpu_kernels: str = field(
        default="exact",
        metadata={
            "help": "Answers of a quantised base on a CPU: exact (default), the official arithmetic; fast: packed 8-bit or 4-bit "
            "kernels, not for training.",
            "choices": ["exact", "fast"],
        },
    )


@dataclass
class DataArguments:
    """Which data, and how it is cut."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more of: .json, .jsonl, .csv, .tsv (also .gz), .xlsx, .parquet, .arrow; a folder of save_to_disk; "
            "dataset:NAME:SPLIT of the hub."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "For the eval loss during training and --do_eval."}
    )
    test_file: list[str] | None = field(
        default=None, metadata={"help": "For --do_predict; default: the validation file."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Id of a hub dataset of data files, or a folder of them: its splits train, validation and test are used "
            "where no file is given."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of the dataset."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the question."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the answer."})
    history_column: str | None = field(default=None, metadata={"help": "Column of past [question, answer] turns."})
    data_format: str = field(
        default="auto",
        metadata={
            "help": "columns, or a chat format: sharegpt, openai, alpaca; auto: columns where they are named, else guessed."
        },
    )
    mix: list[str] | None = field(
        default=None,
        metadata={
            "help": "FILE:RATIO …: mix rows of other files into training, RATIO rows for each row of --train_file, drawn "
            "with --seed. Against forgetting."
        },
    )
    source_prefix: str = field(default="", metadata={"help": "Text put in front of every prompt."})
    loss_on: str = field(
        default="last",
        metadata={
            "help": "last: loss on the answer; all: also on the answers in the history.",
            "choices": ["last", "all"],
        },
    )
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of the prompt, [gMASK] sop included."})
    max_target_length: int = field(
        default=128, metadata={"help": "Tokens of the answer; in prediction, new tokens at most."}
    )
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "max_target_length for evaluation and prediction; default: the same."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every row to the full length, as the official script does; only slower."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first N rows."})
    skip_invalid_rows: bool = field(
        default=False, metadata={"help": "Leave rows with problems out instead of stopping."}
    )

    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode rows; default: one, which uses several threads."}
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Read and encode the data again, also where the cache has its rows."}
    )

    @property
    def eval_target_length(self) -> int:
        return self.val_max_target_length or self.max_target_length

    def sources(self, role: str) -> list[str]:
        """What is read for train, validation or test: files, else the split of the dataset. Empty: nothing."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}[role]
        if files or self.dataset_name:
            return files or [DATASET + ":".join(filter(None, (self.dataset_name, self.dataset_config_name, role)))]
        return self.sources("validation") if role == "test" else []


@dataclass
class GenerationArguments:
    """How answers are generated for the scores."""

    predict_with_generate: bool = field(
        default=False, metadata={"help": "Also score generated answers in --do_eval; --do_predict always generates."}
    )
    generation_mode: str = field(
        default="greedy",
        metadata={
            "help": "greedy; or official: the official script's sampling (top_p 0.7, temperature 0.95) and references "
            "cut at max_target_length.",
            "choices": ["greedy", "official"],
        },
    )
    num_beams: int = field(default=1, metadata={"help": "Beam search with this many beams."})
    generation_batch_tokens: int = field(
        default=16384,
        metadata={
            "help": "Rows decoded together are bounded by this many tokens (prefix, prompt and answer); halved when memory "
            "runs out."
        },
    )
    engine: str = field(
        default="continuous",
        metadata={
            "help": "continuous: this process answers; vllm: vLLM does, at --vllm_url.",
            "choices": ["continuous", "vllm"],
        },
    )
    vllm_url: list[str] | None = field(
        default=None, metadata={"help": "Address of a vLLM server, or of several with the same model."}
    )
    vllm_key: str | None = field(default=None, metadata={"help": "vLLM's own --api-key."})
    prefix_store: str | None = field(
        default=None,
        metadata={"help": "With --engine vllm: the folder that vLLM reads prefixes and LoRAs from."},
    )
    baseline: bool = field(default=False, metadata={"help": "Score the untuned base on the same rows too."})
    baseline_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier evaluation of the untuned base on the same rows, instead of --baseline."
        },
    )
    probe: bool = field(
        default=False,
        metadata={"help": "Answer general questions before and after tuning: what was forgotten?"},
    )


@dataclass
class TuningArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for this job."""

    output_dir: str = field(default="", metadata={"help": "Folder of this run."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run there."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better --metric_for_best_model; keep the best."},
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows a device and step."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Instead of a number of rows: as many rows of similar length as fit into this many tokens, padding included; "
            "a longer row stands alone."
        },
    )
    sequence_parallel: int | None = field(
        default=None,
        metadata={
            "help": "Divide each row among the N processes of torchrun --nproc-per-node N, for rows that one device can't hold (a "
            "prefix's training)."
        },
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows a device in evaluation."})
    loss_average: str = field(
        default="tokens",
        metadata={
            "help": "tokens: every label of a step counts the same; rows: the mean over each forward pass's labels first, then "
            "over accumulation steps and processes, as the official trainer (with batch 1 every row counts the same).",
            "choices": ["tokens", "rows"],
        },
    )
    kernels: str | None = field(
        default=None,
        metadata={
            "help": "How a frozen base computes on a CPU: fast (default there), the same function in less time and memory, and in "
            "evaluation by the faster of torch's libraries; bf16: fast, with frozen matrices multiplied in bf16 while training, "
            "less exact; plain: transformers' own modules.",
            "choices": ["fast", "bf16", "plain"],
        },
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Take each batch in pieces of rows of similar length with at most so many tokens, padding included: the same "
            "gradient in less memory; 0: in one piece. Default: 512 with fast kernels, else 0."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every N steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: a NaN shown as 0 hid broken runs for months."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Where to log: tensorboard, none, …"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows carry their number."})
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every tuned parameter is used in every step; looking for others only costs time."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length, random or sequential."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if isinstance(self.deepspeed, str):
            self.deepspeed = shipped.find(self.deepspeed)
        # Not said: on where the estimate says that it is needed (ptuning.training.checkpointing).
        self.checkpointing_given = (self.activation_checkpointing, self.gradient_checkpointing) != (None, None)
        # The names that everybody knows; transformers takes them too, with a warning.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.activation_checkpointing_kwargs is None:
            # The reentrant kind needs an input that requires grad, which a frozen base doesn't have.
            self.activation_checkpointing_kwargs = {"use_reentrant": False}
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from error

    @property
    def row_takers(self) -> int:
        """How many processes, or groups of them that divide rows among themselves, train on rows of their own."""
        return max(self.world_size // (self.sequence_parallel or 1), 1)


@dataclass
class Config:
    """All options of one run."""

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    training: TuningArguments

    def to_dict(self) -> dict:
        """Plain values for the run's record, which hides secrets."""
        values: dict[str, Any] = {}
        for group in (self.model, self.data, self.generation):
            values |= {f.name: getattr(group, f.name) for f in fields(group)}
        for name in ("train_file", "validation_file", "test_file"):
            if values[name] is not None and len(values[name]) == 1:
                (values[name],) = values[name]  # as in the records of runs that could only have one
        return values | dict(sorted(self.training.to_dict().items()))
