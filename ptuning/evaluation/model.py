"""What is evaluated, wherever it computes: the one seam between evaluation and engines. `LocalModel` is a model in this process."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ptuning.config.engine import VLLM_KEY
from ptuning.data.encode import EncodedRow
from ptuning.distributed import most_anywhere
from ptuning.evaluation.losses import answer_losses, number_of_batches
from ptuning.families import Template
from ptuning.generation import BeamSearch, Engine, Generator
from ptuning.methods import Companion, attached, bare
from ptuning.packages import require

_LOSS_TOKENS = 4096  # of a batch: each label brings fp32 logits over the vocabulary, 0.26 MB with ChatGLM2-6B's
_SAMPLED = 16  # numbers of each tensor of the base that go into a key


class EvaluatedModel(Protocol):
    """Answers prompts, and says how likely it finds given answers. Under several processes all call alike."""

    def bare(self) -> AbstractContextManager[None]:
        """Inside, it is the untuned base."""
        ...

    def key(self, *settings: object) -> str:
        """16 hex digits that change with the model and the settings, of which what `repr` shows counts."""
        ...

    def companion(self) -> Companion | None:
        """What each request brings along."""
        ...

    def answering(
        self, template: Template, batch_tokens: int, num_beams: int, say: Callable[[str], None]
    ) -> AbstractContextManager[Generator]:
        """What answers requests.

        Args:
            batch_tokens: rows times tokens (prefix, prompt and answer) decoded together at most.
            num_beams: 1 is greedy.
            say: gets a sentence when the batch is made smaller because memory ran out.
        """
        ...

    def losses(self, rows: Sequence[EncodedRow], pad_id: int, filler: EncodedRow) -> list[tuple[float, int]]:
        """Each row's negative log likelihood, summed over its labels, and their number; (0.0, 0) for a row without labels.

        Args:
            rows: this process's, with labels, as `Encoder.training_rows` makes them.
            pad_id: the template's.
            filler: computed where other processes still have rows and this one hasn't.
        """
        ...


class LocalModel:
    """A model in this process, with what a method has attached.

    Args:
        model: or what wraps it under DeepSpeed; its mode is put back after each use.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def bare(self) -> AbstractContextManager[None]:
        return bare(self.model)

    def key(self, *settings: object) -> str:
        """Of some numbers of each tensor, and all that a method has attached."""
        digest = hashlib.sha256(repr(settings).encode())
        method = attached(self.model)
        tuned = set() if method is None else {id(parameter) for parameter in method.parameters(self.model)}
        for parameter in self.model.parameters():
            # Where several processes have a part each: this one's.
            own = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
            numbers = own.detach().flatten()
            if id(parameter) not in tuned:
                numbers = numbers[:: max(len(numbers) // _SAMPLED, 1)]
            digest.update(numbers.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def companion(self) -> Companion | None:
        method = attached(self.model)
        return None if method is None else method.served(self.model, "tuned")

    @contextmanager
    def answering(
        self, template: Template, batch_tokens: int, num_beams: int, say: Callable[[str], None]
    ) -> Iterator[Generator]:
        """The engine's running batch, or transformers' beam search in batches."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self._generator(template, batch_tokens, num_beams, say) as generator:
                yield generator
        finally:
            self.model.train(was_training)

    def _generator(
        self, template: Template, batch_tokens: int, num_beams: int, say: Callable[[str], None]
    ) -> Generator:
        limits: dict[str, Any] = {"batch_tokens": batch_tokens, "notify": say}
        if num_beams > 1:
            return BeamSearch(self.model, template.stop_ids, template.pad_id, num_beams=num_beams, **limits)
        return Engine(self.model, template.stop_ids, **limits)

    def losses(self, rows: Sequence[EncodedRow], pad_id: int, filler: EncodedRow) -> list[tuple[float, int]]:
        calls = most_anywhere(number_of_batches(rows, _LOSS_TOKENS))
        return answer_losses(self.model, rows, pad_id, _LOSS_TOKENS, calls, filler)


class AskedVllm(Protocol):
    """What commands that vLLM answers for are told alike."""

    @property
    def vllm_url(self) -> Sequence[str] | None: ...

    @property
    def vllm_key(self) -> str | None: ...

    @property
    def prefix_store(self) -> str | None: ...


def connect(asked: AskedVllm, base: str, checkpoint: str | None, template: Template) -> EvaluatedModel:
    """A model that vLLM computes; arguments and errors as `VllmModel`."""
    require("--engine vllm", "httpx", "ptuning[serve]", instead="leave --engine out")
    from ptuning.evaluation.vllm import VllmModel  # here, because only it needs httpx

    key = asked.vllm_key or os.environ.get(VLLM_KEY)
    return VllmModel(asked.vllm_url or (), key, base, checkpoint, asked.prefix_store, template)
