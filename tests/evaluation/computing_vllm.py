"""A fake vLLM that computes as the real one does: the base, after keys and values from the store, and nothing twice."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel

from ptuning.families import Template
from tests.serving.fake_vllm import FakeVllm


class ComputingVllm(FakeVllm):
    """As FakeVllm, over a bare model in this process.

    Args:
        model: the base.
        store: where prefixes are.
    """

    def __init__(self, model: PreTrainedModel, template: Template, store: Path, **options):
        super().__init__(template, **options)
        self.model, self.store = model, store
        self.numbers_from = 3  # log probabilities a token from which on memory without NaN is found
        self.cached: dict[str, list[list[int]]] = {}  # prompts and answers whose blocks are there, by their salt

    def answer_ids(self, body: dict) -> list[int]:
        ids, rule = body["token_ids"], body["sampling_params"]
        logits, cache = self._logits(body)
        made: list[int] = []
        while len(made) < rule["max_tokens"] and (token := int(logits[-1].argmax())) not in rule["stop_token_ids"]:
            made.append(token)
            place = torch.tensor([[len(ids) + len(made) - 1]])
            with torch.no_grad():
                logits = self.model(torch.tensor([[token]]), past_key_values=cache, position_ids=place).logits[0]
        self.cached.setdefault(body.get("cache_salt", ""), []).append([*ids, *made])
        return made

    def prompt_logprobs(self, body: dict) -> list[dict | None]:
        """Memory that nothing was written into where the tokens' blocks needn't be computed: those of a prefix, and with one those
        of an earlier request with the same salt. What is left there from earlier is at times not a number."""
        ids, params = body["token_ids"], body.get("kv_transfer_params") or {}
        skipped = params.get("length", 0)
        for earlier in self.cached.get(body["cache_salt"], ()) if params else ():
            same = next(
                (i for i, pair in enumerate(zip(ids, earlier, strict=False)) if pair[0] != pair[1]), len(earlier)
            )
            skipped = max(skipped, same)
        if params:
            self.cached.setdefault(body["cache_salt"], []).append(ids)
        left_over = float("nan") if body["sampling_params"]["prompt_logprobs"] < self.numbers_from else 0.0
        logprobs = self._logits(body)[0].log_softmax(-1)
        entries: list[dict | None] = [None]
        for place in range(1, len(ids)):
            row = place - 1 - params.get("length", 0)
            if place <= skipped or row < 0:
                entries.append({"0": {"logprob": left_over, "rank": 0}})
                continue
            likeliest = int(logprobs[row].argmax())
            kept = {str(token): {"logprob": float(logprobs[row, token])} for token in (likeliest, ids[place])}
            entries.append(kept)
        return entries

    def _logits(self, body: dict) -> tuple[torch.Tensor, DynamicCache]:
        """Of the tokens behind the placeholders, and the cache after them."""
        cache, length = DynamicCache(), 0
        if (params := body.get("kv_transfer_params")) is not None:
            length = params["length"]
            assert (
                body["cache_salt"].partition(".")[0] == params["prefix"] and body["token_ids"][:length] == [0] * length
            )
            tensors = load_file(self.store / f"{params['prefix']}.safetensors")
            for layer, (keys, values) in enumerate(zip(tensors["keys"], tensors["values"], strict=True)):
                cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
        ids = torch.tensor([body["token_ids"][length:]])
        places = torch.arange(length, length + ids.shape[1])[None]
        with torch.no_grad():
            logits = self.model(ids, past_key_values=cache, position_ids=places).logits[0]
        return logits, cache
