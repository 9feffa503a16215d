"""With which kernels a run trains: by its options, where it runs, and the run that it continues."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ptuning.config import Config, TuningArguments
from ptuning.distributed import of_main_process
from ptuning.errors import ConfigError
from ptuning.kernels import (
    BF16,
    CHUNKS,
    FAST,
    LIGER,
    ONEDNN,
    PLAIN,
    TORCH,
    fastest_product,
    fastest_to_answer,
    gpu_loss,
    narrow_refusal,
    products,
)
from ptuning.loading import resolve_dtype
from ptuning.messages import message
from ptuning.methods import Method
from ptuning.quantization import asked_precision
from ptuning.runs import RunRecord
from ptuning.runs.resume import PLAIN_KERNELS

MICRO_BATCH_TOKENS = 512  # where neither speed nor memory gains from fewer or more (docs/benchmarks.md)


@dataclass(frozen=True)
class Kernels:
    """What a run computes with, as its record holds it: another choice rounds otherwise.

    Args:
        kernels: fast: those of `ptuning.kernels`; bf16: these with narrow products; plain: transformers' own.
        product: of the frozen linear layers, one of `ptuning.kernels.products()`, or `BF16`.
        micro_batch_tokens: a step's batch is taken in pieces of so many tokens at most; 0: in one piece.
        answers: the product of the run's evaluations.
        gpu_loss: what a frozen base's loss is computed by on a GPU without the logits of all labels; None: with them, or no GPU.
    """

    kernels: str = PLAIN_KERNELS["kernels"]
    product: str = PLAIN_KERNELS["product"]
    micro_batch_tokens: int = PLAIN_KERNELS["micro_batch_tokens"]
    answers: str = TORCH
    gpu_loss: str | None = None

    @property
    def fast(self) -> bool:
        """Whether they are those of `ptuning.kernels`."""
        return self.kernels != PLAIN

    @property
    def narrow(self) -> bool:
        """Whether the frozen matrices are multiplied in bf16."""
        return self.product == BF16

    @property
    def loss(self) -> str | None:
        """What computes the loss without the logits of all labels; None: nothing does."""
        return CHUNKS if self.fast else self.gpu_loss

    def to_dict(self) -> dict[str, Any]:
        """What a run's record holds."""
        return asdict(self)

    def __str__(self) -> str:
        pieces = message("pieces", tokens=self.micro_batch_tokens) if self.micro_batch_tokens else ""
        if not self.fast:
            said = {LIGER: "loss_by_liger", CHUNKS: "loss_in_chunks"}.get(self.gpu_loss or "")
            loss = "" if said is None else message(said)
            return message("plain_kernels", loss=loss, pieces=pieces)
        library = message({ONEDNN: "by_onednn", BF16: "by_bf16"}.get(self.product, "by_torch"))
        return message("fast_training", kernels=self.kernels, library=library, pieces=pieces)


def chosen_kernels(config: Config, method: Method | None, before: RunRecord | None = None) -> Kernels:
    """What a run trains with on this machine, measured where it must be. Arguments as `kernels_of`."""
    kernels = with_product(kernels_of(config, method, before), config, before)
    return with_gpu_loss(kernels, config, method, before)


def kernels_of(
    config: Config,
    method: Method | None,
    before: RunRecord | None = None,
    *,
    device_type: str | None = None,
    deepspeed: bool | None = None,
) -> Kernels:
    """What a run's options mean; which library multiplies is left to `with_product`.

    Args:
        before: the run that is continued, which says what isn't given; a record without a word of it is of plain kernels.
        device_type: "cpu" or "cuda"; default: this machine's.
        deepspeed: whether there is a DeepSpeed file; default: from the options.
    """
    training = config.training
    if not training.do_train:
        return Kernels()
    known = Kernels() if before is None else _of_record(before.kernels)
    applies = why_not(config, method, device_type=device_type, deepspeed=deepspeed) is None
    wish = training.kernels or (known.kernels if before is not None else FAST)
    kernels = wish if applies else PLAIN
    tokens = training.micro_batch_tokens
    if tokens is None:
        tokens = known.micro_batch_tokens if before is not None else _in_pieces(training) if kernels != PLAIN else 0
    product = BF16 if kernels == BF16 else TORCH if known.product == BF16 else known.product
    return Kernels(kernels, product, tokens, known.answers, known.gpu_loss)


def with_product(kernels: Kernels, config: Config, before: RunRecord | None = None) -> Kernels:
    """The same with the libraries that multiply: those of the run that is continued, where this machine has them, else the faster
    ones by short measurements of the first process.

    Raises:
        ConfigError: the run that is continued multiplies in bf16, and this machine doesn't.
    """
    if kernels.narrow and (why := of_main_process(narrow_refusal())) is not None:  # continued elsewhere
        raise ConfigError(f"the run was trained with --kernels bf16, and {why}; continue it on a machine like that one")
    numbers = resolve_dtype(config.model.dtype, torch.device("cpu"))
    if not kernels.fast or numbers != torch.float32 or asked_precision(config.model) is not None:
        return replace(kernels, product=TORCH, answers=TORCH)
    if before is not None:
        here = (*products(), BF16)
        product, answers = (known if known in here else TORCH for known in (kernels.product, kernels.answers))
        return replace(kernels, product=product, answers=answers)
    product = kernels.product if kernels.narrow else of_main_process(fastest_product())
    return replace(kernels, product=product, answers=of_main_process(fastest_to_answer()))


def with_gpu_loss(
    kernels: Kernels,
    config: Config,
    method: Method | None,
    before: RunRecord | None = None,
    *,
    device_type: str | None = None,
    deepspeed: bool | None = None,
) -> Kernels:
    """The same with what computes the loss on a GPU beside a frozen base: that of the run that is continued where it is here, else
    the better one. Arguments as `kernels_of`.

    Args:
        device_type: of another machine, which is taken to have no more than every installation has; default: this machine's.
    """
    training = config.training
    gpu = not training.use_cpu if device_type is None else device_type == "cuda"
    # What keeps the fast kernels away, but for the GPU itself, keeps this away too.
    possible = training.do_train and gpu and why_not(config, method, device_type="cpu", deepspeed=deepspeed) is None
    if kernels.fast or training.kernels == PLAIN or not possible:
        return replace(kernels, gpu_loss=None)
    here = of_main_process(gpu_loss()) if device_type is None else CHUNKS
    if before is not None and here is not None and kernels.gpu_loss != LIGER:
        here = kernels.gpu_loss
    return replace(kernels, gpu_loss=here)


def why_not(
    config: Config, method: Method | None, *, device_type: str | None = None, deepspeed: bool | None = None
) -> str | None:
    """Why the fast kernels can't train this run; None: they can. Arguments as `kernels_of`."""
    training = config.training
    if method is None or not method.keeps_base:
        return "they are for a frozen base (--method prefix or lora), and all weights train"
    if device_type == "cuda" or (device_type is None and not training.use_cpu):
        return "they are for CPUs, and this run is on a GPU"
    if training.deepspeed is not None if deepspeed is None else deepspeed:
        return "DeepSpeed handles weights and gradients in its own way"
    if training.bf16 or training.fp16:
        return "--bf16 and --fp16 convert weights at each product"
    if training.torch_compile:
        return "--torch_compile makes kernels of its own"
    return None


def check_kernels(config: Config, method: Method | None) -> list[str]:
    """What about --kernels and --micro_batch_tokens can't be done: one sentence each, with the fix."""
    training, problems = config.training, []
    if not training.do_train:
        # Whether --kernels fast can be depends on the base, and is said where that is loaded (ptuning.kernels.swap_to_answer).
        given = {
            "--kernels bf16": training.kernels == BF16,
            "--micro_batch_tokens": training.micro_batch_tokens is not None,
        }
        return [f"{option} is for training; leave it out" for option, asked in given.items() if asked]
    if training.kernels in (FAST, BF16):
        why = why_not(config, method)
        if why is None and training.kernels == BF16:
            why = _why_not_narrow(config)
        if why is not None:
            problems.append(f"--kernels {training.kernels}: {why}; leave it out")
    if training.micro_batch_tokens and training.deepspeed is not None:
        problems.append(
            f"--micro_batch_tokens {training.micro_batch_tokens}: DeepSpeed's engine counts backward passes, one a batch; leave it "
            "out, and give fewer rows a batch with --per_device_train_batch_size and --gradient_accumulation_steps"
        )
    return problems


def _why_not_narrow(config: Config) -> str | None:
    if asked_precision(config.model) is not None:
        return "they are for the matrices of a base in float32, and a quantised one multiplies in its own way"
    if (dtype := resolve_dtype(config.model.dtype, torch.device("cpu"))) != torch.float32:
        return f"they are for a base in float32, and --dtype makes it {str(dtype)[6:]}"
    return narrow_refusal()


def _in_pieces(training: TuningArguments) -> int:
    return 0 if training.sequence_parallel else MICRO_BATCH_TOKENS  # a process has no row as a whole


def _of_record(values: Mapping[str, Any]) -> Kernels:
    """
    Raises:
        ConfigError: of another version.
    """
    try:
        return Kernels(**values)
    except TypeError:
        raise ConfigError(
            f"the record of the run has kernels {dict(values)}, which this version doesn't know; continue it with the version that "
            "wrote it"
        ) from None
