"""The decode loop: one forward call a step, over rows that join and leave between steps.

The prefix lies in the first columns of a row's cache, where attention sees it before every token, and positions count the
real tokens from 0: the same function as the official prefix (tests hold it to the golden answers), with rows of
different prefixes, or none, side by side.

A long prompt is computed in pieces against what is in the cache, so that memory grows with its length, not with the square, and
so that rows that are being answered can take turns with it (pace.py).
"""

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ptuning.errors import GenerationError
from ptuning.families.logits import logits_at
from ptuning.generation.pace import PIECE_TOKENS, Pace
from ptuning.generation.prefix_cache import PrefixCache
from ptuning.generation.protocol import GenerationRequest, Token
from ptuning.generation.sampling import Chooser, choose
from ptuning.generation.slots import SlotCache, row_dimensions
from ptuning.generation.together import allow_together
from ptuning.messages import message
from ptuning.methods import Companion, bare


class _Row:
    """A request while it runs."""

    def __init__(self, request: GenerationRequest):
        self.request, self.chooser = request, Chooser(request.sampling, request.ids)
        self.ids = list(request.ids)  # prompt and answer so far
        self.cached = 0  # of these, how many have their keys and values in the cache

    @property
    def start(self) -> int:
        """Columns in use."""
        return (self.request.prefix.length if self.request.prefix else 0) + self.cached


class Engine:
    """Answers requests in one running batch. A Generator for one thread; use it as
    `with Engine(model, …) as engine`.

    While it is entered the model computes without an attached prefix (each request names its own) and with sdpa.

    Args:
        model: in eval mode.
        stop_ids: each of them ends an answer; without any, answers end only at max_new_tokens.
        batch_tokens: rows times cache columns at most; a request that needs more by itself still runs, alone.
        max_rows: of the batch.
        prefill_tokens: prompt tokens of one step at most; a longer prompt takes several.
        pause: how long running rows wait for prompts, see Pace; None: until there are none.
        prefix_cache_tokens: keys and values of this many tokens of ended rows are kept for the next turn of their
            dialogue.
        notify: gets a sentence when the batch is made smaller because memory ran out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Sequence[int],
        *,
        batch_tokens: int = 16384,
        max_rows: int = 64,
        prefill_tokens: int = PIECE_TOKENS,
        pause: float | None = None,
        prefix_cache_tokens: int = 0,
        notify: Callable[[str], None] = warnings.warn,
    ):
        self.model, self.stop_ids = model, frozenset(stop_ids)
        self.batch_tokens, self.max_rows = batch_tokens, max_rows
        self.pace = Pace(prefill_tokens, pause)
        self.prefix_cache, self.notify = PrefixCache(prefix_cache_tokens), notify
        self.rows: list[_Row] = []  # being answered; row i has slot i
        self.partial: _Row | None = None  # whose prompt is computed in part; it has the slot behind them
        self.waiting: deque[_Row] = deque()
        sizes = row_dimensions(model.config)
        groups = sizes.groups // (model.tp_size or 1)
        self.cache = SlotCache(sizes.layers, groups, sizes.head_dim, model.dtype, model.device)

    def __enter__(self) -> "Engine":
        self._entered = ExitStack()
        self._entered.enter_context(bare(self.model))
        self._attention = self.model.config._attn_implementation
        self.model.config._attn_implementation = "sdpa"  # takes a mask of any shape, which flash kernels don't
        self._together = self.pace.pause is not None and allow_together(self.model.config)
        return self

    def __exit__(self, *exc) -> None:
        self.model.config._attn_implementation = self._attention
        self._entered.close()
        self.cache.clear()

    def submit(self, requests: Iterable[GenerationRequest], anywhere: Callable[[bool], bool] = bool) -> Iterator[Token]:
        """Answers all of them; see Generator. Abandoning the iterator leaves what isn't answered: `cancel` it."""
        for request in requests:
            self.add(request)
        while anywhere(self.has_work):
            if self.has_work:
                yield from self.step()
            else:
                self.idle_step()

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.partial or self.waiting)

    def add(self, request: GenerationRequest) -> None:
        """Queues a request.

        Raises:
            ValueError: no tokens, a token that the model doesn't have, or no new tokens wanted.
        """
        vocabulary = self.model.config.vocab_size
        if not request.ids or min(request.ids) < 0 or max(request.ids) >= vocabulary:
            raise ValueError(f"request {request.id}: tokens must be from 0 to {vocabulary - 1}, and at least one")
        if request.max_new_tokens < 1:
            raise ValueError(f"request {request.id}: max_new_tokens is {request.max_new_tokens}, the least is 1")
        self.waiting.append(_Row(request))

    def cancel(self, id: Hashable) -> bool:
        """Takes a request out, at once. Returns whether it was there."""
        for index, row in enumerate(self.rows):
            if row.request.id == id:
                with inference():
                    self._leave(index)
                return True
        if self.partial is not None and self.partial.request.id == id:
            with inference():
                self._keep(self.partial, len(self.rows))
            self.partial = None
            return True
        for row in self.waiting:
            if row.request.id == id:
                self.waiting.remove(row)
                return True
        return False

    def forget(self, prefix: Companion) -> None:
        """Drops what is kept of a prefix's dialogues."""
        self.prefix_cache.drop(prefix)

    def step(self) -> list[Token]:
        """One forward call: prompts of rows that can join, the next token of every running row, or both with a piece of a prompt.

        Returns:
            What became known, in the rows' order; empty when there is no work, after a piece of a prompt, or when memory
            ran out and the batch was made smaller.

        Raises:
            GenerationError: a single row doesn't fit into memory. That row is taken out; the engine can go on.
        """
        tokens = self.pace.tokens(bool(self.rows))
        joining = [] if self.rows and self.pace.rows_turn() else self._prompts(tokens)
        if not joining and not self.rows:
            return []
        try:
            with inference():
                return self._forward(joining, tokens) if joining else self._next_tokens()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(joining, error)
            return []

    def idle_step(self) -> None:
        """A forward call without a request: under ZeRO-3 all processes gather each layer together."""
        with inference():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device))

    def _prompts(self, tokens: int) -> list[_Row]:
        """The prompt that is computed in part; else takes from the queue, in order, what fits beside the running rows."""
        if self.partial is not None:
            return [self.partial]
        joining: list[_Row] = []
        widest = max((row.request.room for row in self.rows), default=0)
        prompts = 0
        while self.waiting and len(self.rows) + len(joining) < self.max_rows:
            row = self.waiting[0]
            wider = max(widest, row.request.room)
            longest = max(prompts, len(row.ids))
            others = len(self.rows) + len(joining)
            if others and (others + 1) * wider > self.batch_tokens:
                break
            if joining and (len(joining) + 1) * longest > tokens:
                break
            joining.append(self.waiting.popleft())
            widest, prompts = wider, longest
        return joining

    def _next_tokens(self) -> list[Token]:
        """Of every running row."""
        with self.pace.measured(rows=True, prompt_tokens=0):
            logits_NV = self._logits(self.rows, 0, [row.ids[row.cached :] for row in self.rows])
            return self._chosen(list(self.rows), logits_NV)

    def _forward(self, prompts: list[_Row], tokens: int) -> list[Token]:
        """Computes prompts as far as this step goes, behind the running rows.

        Args:
            prompts: of rows that join, or the one that is computed in part.
            tokens: of a single one at most.
        """
        first = len(self.rows)
        if self.partial is None:
            self._place(prompts, first, tokens)
        new = [row.ids[row.cached :][:tokens] for row in prompts]
        rows = list(self.rows) if self._together and len(prompts) == 1 else []
        with self.pace.measured(rows=bool(rows), prompt_tokens=len(new) * max(map(len, new))):
            together = self._logits_together(rows, prompts[0], new[0]) if rows else None
            logits_NV = self._logits(prompts, first, new) if together is None else together
            self.partial = prompts[0] if prompts[0].cached < len(prompts[0].ids) else None
            if self.partial is None:
                self.rows += prompts
                rows += prompts
            return self._chosen(rows, logits_NV[: len(rows)]) if rows else []

    def _logits(self, rows: list[_Row], first: int, new: list[list[int]]) -> torch.Tensor:
        """Computes tokens that aren't in the cache yet.

        Args:
            rows: whose.
            first: the slot of the first one; the others follow.
            new: the tokens of each.

        Returns:
            (rows, V) in fp32: of each row's last token.
        """
        longest, device = max(map(len, new)), self.model.device
        starts = torch.tensor([row.start for row in rows], device=device)
        positions = torch.tensor([row.cached for row in rows])[:, None] + torch.arange(longest)
        newest = torch.tensor([len(ids) - 1 for ids in new], device=device)
        with (
            _companions(self.model, rows),
            logits_at(self.model, torch.arange(longest, device=device) == newest[:, None]),
        ):
            logits_NV = self.model(
                input_ids=torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=device),
                attention_mask=self.cache.begin(first, starts, longest),
                position_ids=positions.to(device),
                past_key_values=self.cache,
            ).logits.float()
        for row, ids in zip(rows, new, strict=True):
            row.cached += len(ids)
        return logits_NV

    def _logits_together(self, rows: list[_Row], prompt: _Row, piece: list[int]) -> torch.Tensor:
        """Computes every running row's newest token and a piece of the prompt behind them.

        Returns:
            (rows + 1, V) in fp32: of each row's token, and of the piece's last one.
        """
        device, count = self.model.device, len(rows)
        ids = [row.ids[-1] for row in rows] + piece
        positions = [row.cached for row in rows] + list(range(prompt.cached, prompt.cached + len(piece)))
        starts = torch.tensor([row.start for row in rows], device=device)
        layout = self.cache.begin_together(starts, prompt.start, len(piece))
        wanted = torch.arange(len(ids), device=device)
        with (
            _companions(self.model, [*rows, *([prompt] * len(piece))]),
            logits_at(self.model, ((wanted < count) | (wanted == len(ids) - 1))[:, None]),
        ):
            logits_NV = self.model(
                input_ids=torch.tensor(ids, device=device)[:, None],
                attention_mask=layout.rows_mask,
                position_ids=torch.tensor(positions, device=device)[:, None],
                past_key_values=self.cache,
                layout=layout,
            ).logits.float()
        for row in rows:
            row.cached += 1
        prompt.cached += len(piece)
        return logits_NV

    def _chosen(self, rows: list[_Row], logits_NV: torch.Tensor) -> list[Token]:
        """Chooses each row's next token and reports it."""
        asked = [index for index, row in enumerate(rows) if row.request.logprobs is not None]
        logprobs = dict(zip(asked, logits_NV[asked].log_softmax(-1), strict=True))
        return self._report(rows, choose(logits_NV, [row.chooser for row in rows]), logprobs)

    def _place(self, rows: list[_Row], first: int, tokens: int) -> None:
        """Fills the slots of joining rows with their prefix and what is known of their past; of a single one's prompt the next
        step computes so many tokens."""
        known = [self.prefix_cache.longest(row.request.prefix, row.ids) for row in rows]
        for row, past in zip(rows, known, strict=True):
            row.cached = 0 if past is None else past.shape[3]
        padded = max(row.start for row in rows) + max(min(len(row.ids) - row.cached, tokens) for row in rows)
        columns = max(padded, *(row.request.room for row in [*self.rows, *rows]))
        self.cache.reserve(first + len(rows), columns, keep=first, budget=self.batch_tokens)
        for slot, (row, past) in enumerate(zip(rows, known, strict=True), start=first):
            if row.request.prefix is not None and row.request.prefix.key_values is not None:
                self.cache.put(slot, 0, row.request.prefix.key_values)
            if past is not None:
                self.cache.put(slot, row.start - row.cached, past)

    def _report(self, rows: list[_Row], chosen: list[int], logprobs: dict[int, torch.Tensor]) -> list[Token]:
        """Appends the chosen tokens to their rows, and takes out the rows that end with them."""
        answers, ended = [], []
        for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            request = row.request
            extra = _likeliest(logprobs[index], token, request.logprobs or 0) if index in logprobs else {}
            if token in self.stop_ids:
                answers.append(Token(request.id, None, "stop", **extra))
                ended.append(row)
                continue
            row.ids.append(token)
            full = len(row.ids) == len(request.ids) + request.max_new_tokens
            answers.append(Token(request.id, token, "length" if full else None, **extra))
            if full:
                ended.append(row)
        for row in ended:
            self._leave(self.rows.index(row))
        return answers

    def _leave(self, index: int) -> None:
        """Frees a slot. The last row moves into it, so that the rows in use stay the first ones."""
        row = self.rows[index]
        self._keep(row, index)
        last = self.rows.pop()
        if last is not row:
            self.cache.move(len(self.rows), index, last.start)
            self.rows[index] = last
        if self.partial is not None:
            self.cache.move(len(self.rows) + 1, len(self.rows), self.partial.start)

    def _keep(self, row: _Row, slot: int) -> None:
        """What was computed, for the next turn of its dialogue."""
        if self.prefix_cache.capacity and row.cached:
            start = row.start - row.cached
            self.prefix_cache.add(
                row.request.prefix, row.ids[: row.cached], self.cache.take(slot, start, start + row.cached)
            )

    def _shrink(self, joining: list[_Row], error: Exception) -> None:
        """Halves the batch and puts all rows back into the queue; what they have generated stays."""
        others = [*joining, *([] if self.partial is None else [self.partial])]
        rows = self.rows + [row for row in dict.fromkeys(others) if row not in self.rows]
        before = len(rows) * max(row.request.room for row in rows)
        self.rows, self.partial = [], None
        self.cache.clear()
        self.prefix_cache.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            request = rows[0].request
            raise GenerationError(
                f"a prompt of {len(request.ids)} tokens with {request.max_new_tokens} new ones doesn't fit into memory even "
                "alone; use shorter lengths or a smaller dtype",
                request.id,
            ) from error
        self.waiting.extendleft(reversed(rows))
        self.batch_tokens = max(min(self.batch_tokens, before) // 2, 1)
        self.notify(ran_out(len(rows), self.batch_tokens))


@contextmanager
def _companions(model: PreTrainedModel, rows: Sequence[_Row]) -> Iterator[None]:
    """Inside, each row is computed with what its request brings along."""
    places: dict[Companion, list[int]] = {}
    for index, row in enumerate(rows):
        if row.request.prefix is not None:
            places.setdefault(row.request.prefix, []).append(index)
    with ExitStack() as stack:
        for companion, indices in places.items():
            stack.enter_context(companion.on(model, indices))
        yield


def _likeliest(logprobs_V: torch.Tensor, token: int, count: int) -> dict:
    """The report on one choice, as fields of Token."""
    values, tokens = logprobs_V.topk(count)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return {"logprob": float(logprobs_V[token]), "top": top}


def inference() -> AbstractContextManager:
    """Inside, no gradients are kept. ZeRO-3 keeps gathered weights for training, where inference tensors can't be used."""
    return torch.no_grad() if is_deepspeed_zero3_enabled() else torch.inference_mode()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a forward call says that memory ran out, on an accelerator or on the CPU."""
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def ran_out(rows: int, batch_tokens: int) -> str:
    """The sentence for the user: with how many rows it happened, and the new bound."""
    return message("memory_ran_out", rows=rows, batch_tokens=batch_tokens)
