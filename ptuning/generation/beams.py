"""transformers' beam search behind the protocol, in batches that stay together."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from ptuning.errors import GenerationError
from ptuning.generation.budget import is_out_of_memory, ran_out
from ptuning.generation.forward import inference
from ptuning.generation.protocol import GenerationRequest, Token
from ptuning.methods import attached, bare


class BeamSearch(AbstractContextManager):
    """A Generator that is deterministic: sampling and logprobs of a request don't count.

    A request without a prefix is answered by the bare base, one with a prefix by what is attached to the model.

    Args:
        model: in eval mode.
        stop_ids: each of them ends an answer; without any, answers end only at max_new_tokens.
        pad_id: fills shorter prompts on the left.
        num_beams: of each answer.
        batch_tokens: rows times beams times tokens (prefix, prompt and answer) at most; halved when memory runs out.
        notify: gets a sentence when the batch is made smaller because memory ran out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Sequence[int],
        pad_id: int,
        *,
        num_beams: int,
        batch_tokens: int = 16384,
        notify: Callable[[str], None] = warnings.warn,
    ):
        self.model, self.stop_ids, self.pad_id = model, list(stop_ids), pad_id
        self.num_beams, self.batch_tokens, self.notify = num_beams, batch_tokens, notify

    def __exit__(self, *exc) -> None:
        """Nothing stays behind: each batch has a cache of its own."""

    def submit(self, requests: Iterable[GenerationRequest], anywhere: Callable[[bool], bool] = bool) -> Iterator[Token]:
        """Answers all of them, in this order; see Generator."""
        waiting = list(requests)
        if attached(self.model) is None and any(request.prefix is not None for request in waiting):
            raise ValueError("beam search answers with the prefix that is attached to the model, and none is attached")
        while anywhere(bool(waiting)):
            if not waiting:
                self._generate([[self.pad_id]], 1)
                continue
            batch = self._batch(waiting)
            first = batch[0]
            try:
                with nullcontext() if first.prefix is not None else bare(self.model):
                    answers = self._generate([request.ids for request in batch], first.max_new_tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(batch, error)
                continue
            del waiting[: len(batch)]
            for request, ids in zip(batch, answers, strict=True):
                yield from self._tokens(request, ids)

    def _batch(self, waiting: list[GenerationRequest]) -> list[GenerationRequest]:
        """The next requests that can be computed together: of one prefix and one limit, within the budget."""
        first, widest = waiting[0], 0
        batch: list[GenerationRequest] = []
        for request in waiting:
            widest = max(widest, request.room)
            fits = (len(batch) + 1) * self.num_beams * widest <= self.batch_tokens
            alike = request.prefix is first.prefix and request.max_new_tokens == first.max_new_tokens
            if batch and not (fits and alike):
                break
            batch.append(request)
        return batch

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        padding = [longest - len(ids) for ids in prompts]
        device, pad = self.model.device, [self.pad_id]
        ids_BS = torch.tensor([pad * n + ids for n, ids in zip(padding, prompts, strict=True)], device=device)
        mask_BS = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        with inference():
            output = self.model.generate(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                max_new_tokens=max_new_tokens,
                num_beams=self.num_beams,
                do_sample=False,
                eos_token_id=self.stop_ids or None,
                pad_token_id=self.pad_id,
            )
        return output[:, longest:].tolist()

    def _tokens(self, request: GenerationRequest, ids: list[int]) -> Iterator[Token]:
        """The row that `generate` made, as tokens; what follows a stop token in it is padding."""
        for count, token in enumerate(ids, start=1):
            if token in self.stop_ids:
                yield Token(request.id, None, "stop")
                return
            yield Token(request.id, token, "length" if count == len(ids) else None)

    def _shrink(self, batch: list[GenerationRequest], error: Exception) -> None:
        room = self.num_beams * max(request.room for request in batch)
        if len(batch) == 1:
            request = batch[0]
            raise GenerationError(
                f"a prompt of {len(request.ids)} tokens with {request.max_new_tokens} new ones and {self.num_beams} beams "
                "doesn't fit into memory even alone; use fewer beams, shorter lengths or a smaller dtype",
                request.id,
            ) from error
        self.batch_tokens = len(batch) * room // 2
        self.notify(ran_out(len(batch), self.batch_tokens))
