"""The decode loop: one forward call a step, over rows that join and leave between steps.

The prefix lies in the first columns of a row's cache, where attention sees it before every token, and positions count the
real tokens from 0: the same function as the official prefix (tests hold it to the golden answers), with rows of
different prefixes, or none, side by side.

A long prompt is computed in pieces against what is in the cache, so that memory grows with its length, not with the square, and
so that rows that are being answered can take turns with it (pace.py).

Rows get room for what they have and a step more, not for the longest answer that they may give. When all have grown and the
batch is too large, the one that came last goes back to the front of the queue, with its text (row.py).
"""

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count

import torch
from transformers import PreTrainedModel

from ptuning.errors import GenerationError
from ptuning.generation.budget import Budget, is_out_of_memory
from ptuning.generation.forward import Forward, inference
from ptuning.generation.pace import PIECE_TOKENS, Pace, evenly
from ptuning.generation.prefix_cache import LEAST, PrefixCache, in_common
from ptuning.generation.protocol import GenerationRequest, Token
from ptuning.generation.row import Row
from ptuning.generation.sampling import choose
from ptuning.generation.slots import SlotCache, row_dimensions
from ptuning.generation.together import allow_together
from ptuning.kernels import step_program
from ptuning.methods import Companion, bare


class Engine:
    """Answers requests in one running batch. A Generator for one thread; use it as
    `with Engine(model, …) as engine`.

    While it is entered the model computes without an attached prefix (each request names its own) and with sdpa.

    Args:
        model: in eval mode.
        stop_ids: each of them ends an answer; without any, answers end only at max_new_tokens.
        batch_tokens: rows times cache columns in use at most; a request that needs more by itself still runs, alone.
        max_rows: of the batch.
        prefill_tokens: prompt tokens of one step at most; a longer prompt takes several.
        pause: how long running rows wait for prompts, see Pace; None: until there are none.
        prefix_cache_tokens: keys and values of this many tokens of ended rows are kept for the next turn of their
            dialogue.
        notify: gets a sentence when the batch is made smaller because memory ran out, and when it is whole again.
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
        self.budget, self.max_rows = Budget(batch_tokens, notify), max_rows
        self.pace = Pace(prefill_tokens, pause)
        self.prefix_cache = PrefixCache(prefix_cache_tokens)
        self.rows: list[Row] = []  # being answered; row i has slot i
        self.partial: Row | None = None  # whose prompt is computed in part; it has the slot behind them
        self.waiting: deque[Row] = deque()  # by arrival
        self.set_back = 0  # how often a row went back into the queue for lack of room
        self._arrivals = count()
        sizes = row_dimensions(model.config)
        groups = sizes.groups // (model.tp_size or 1)
        self.cache = SlotCache(sizes.layers, groups, sizes.head_dim, model.dtype, model.device)
        self._compute = Forward(model, self.cache)

    def __enter__(self) -> "Engine":
        self._entered = ExitStack()
        self._entered.enter_context(bare(self.model))
        self._attention = self.model.config._attn_implementation
        self.model.config._attn_implementation = "sdpa"  # takes a mask of any shape, which flash kernels don't
        self._compute.apart = allow_together(self.model.config)
        self._compute.step = step_program(self.model) if self._compute.apart else None
        self._together = self.pace.pause is not None and self._compute.apart
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
        self.waiting.append(Row(request, next(self._arrivals)))

    def cancel(self, id: Hashable) -> bool:
        """Takes a request out, at once. Returns whether it was there."""
        for row in self._placed:
            if row.request.id == id:
                with inference():
                    self._take_out([row])
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
        joining: list[Row] = []
        try:
            with inference():
                self._make_room()
                tokens = self.pace.tokens(bool(self.rows))
                if not (self.rows and self.pace.rows_turn()):
                    joining = self._prompts(tokens)
                if not joining and not self.rows:
                    return []
                answers = self._forward(joining, tokens) if joining else self._next_tokens()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(joining, error)
            return []
        self.budget.went_well()
        return answers

    def idle_step(self) -> None:
        """A forward call without a request: under ZeRO-3 all processes gather each layer together."""
        with inference():
            self._compute.idle()

    def _make_room(self) -> None:
        """Sets rows back, those that came last first, until the others have room for their next token and the prompt that is
        computed in part for the rest of it."""
        while True:
            rows = self._placed
            columns = max((row.columns for row in rows), default=0)
            if self.budget.fits(len(rows), columns):
                return
            last = max(rows, key=lambda row: row.number)
            self._take_out([last])
            last.cached = 0
            self.waiting.appendleft(last)
            self.set_back += 1

    def _prompts(self, tokens: int) -> list[Row]:
        """The prompt that is computed in part; else takes from the queue, in order, what fits beside the running rows."""
        if self.partial is not None:
            return [self.partial]
        joining: list[Row] = []
        widest = max((row.reach for row in self.rows), default=0)
        prompts = 0
        while self.waiting and len(self.rows) + len(joining) < self.max_rows:
            row = self.waiting[0]
            wider = max(widest, row.reach)
            longest = max(prompts, len(row.ids))
            if not self.budget.fits(len(self.rows) + len(joining) + 1, wider):
                break
            if joining and (len(joining) + 1) * longest > tokens:
                break
            joining.append(self.waiting.popleft())
            widest, prompts = wider, longest
        return joining

    def _next_tokens(self) -> list[Token]:
        """Of every running row."""
        self._reserve()
        with self.pace.measured(rows=True, prompt_tokens=0):
            logits_NV = self._compute.next_logits(self.rows)
            return self._chosen(list(self.rows), logits_NV)

    def _forward(self, prompts: list[Row], tokens: int) -> list[Token]:
        """Computes prompts as far as this step goes, behind the running rows.

        Args:
            prompts: of rows that join, or the one that is computed in part.
            tokens: of a single one at most.
        """
        first = len(self.rows)
        started = self.pace.clock()
        if self.partial is None:
            self._place(prompts, first, tokens)
        else:
            self._reserve()
        if self.rows and len(prompts) == 1:
            tokens = min(tokens, self.pace.tokens(True, self.pace.clock() - started))
            tokens = evenly(len(prompts[0].ids) - prompts[0].cached, tokens)
        new = [row.ids[row.cached :][:tokens] for row in prompts]
        rows = list(self.rows) if self._together and len(prompts) == 1 else []
        with self.pace.measured(rows=bool(rows), prompt_tokens=len(new) * max(map(len, new))):
            together = self._compute.logits_together(rows, prompts[0], new[0]) if rows else None
            logits_NV = self._compute.logits(prompts, first, new) if together is None else together
            self.partial = prompts[0] if prompts[0].cached < len(prompts[0].ids) else None
            if self.partial is None:
                self.rows += prompts
                rows += prompts
            return self._chosen(rows, logits_NV[: len(rows)]) if rows else []

    def _chosen(self, rows: list[Row], logits_NV: torch.Tensor) -> list[Token]:
        """Chooses each row's next token and reports it."""
        asked = [index for index, row in enumerate(rows) if row.request.logprobs is not None]
        logprobs = dict(zip(asked, logits_NV[asked].log_softmax(-1), strict=True))
        return self._report(rows, choose(logits_NV, [row.chooser for row in rows]), logprobs)

    def _place(self, rows: list[Row], first: int, tokens: int) -> None:
        """Fills the slots of joining rows with their prefix and what is known of their past; of a single one's prompt the next
        step computes so many tokens."""
        known = [self._known(row) for row in rows]
        for row, past in zip(rows, known, strict=True):
            row.cached = 0 if past is None else past.shape[3]
            if row.reused is None:
                row.reused = row.cached
        padded = max(row.start for row in rows) + max(min(len(row.ids) - row.cached, tokens) for row in rows)
        columns = max(padded, *(row.reach for row in [*self.rows, *rows]))
        self.cache.reserve(first + len(rows), columns, [row.start for row in self.rows], self.budget.tokens)
        for slot, (row, past) in enumerate(zip(rows, known, strict=True), start=first):
            if row.request.prefix is not None and row.request.prefix.key_values is not None:
                self.cache.put(slot, 0, row.request.prefix.key_values)
            if past is not None:
                self.cache.put(slot, row.start - row.cached, past)

    def _known(self, row: Row) -> torch.Tensor | None:
        """Keys and values (L, 2, G, n, D) of the first n of a row's tokens, from rows that ended or run and begin alike."""
        known = self.prefix_cache.longest(row.request.prefix, row.ids)
        if not self.prefix_cache.capacity:
            return known
        best, found = 0 if known is None else known.shape[3], None
        for slot, other in enumerate(self.rows):
            if other.request.prefix is row.request.prefix:
                alike = in_common(other.ids[: other.cached], row.ids[:-1])
                if alike > max(best, LEAST - 1):
                    best, found = alike, slot
        before = row.request.before
        return known if found is None else self.cache.take(found, before, before + best)

    def _reserve(self) -> None:
        """For the tokens of the rows that have slots."""
        rows = self._placed
        columns = max(row.columns for row in rows)
        self.cache.reserve(len(rows), columns, [row.start for row in rows], self.budget.tokens)

    @property
    def _placed(self) -> list[Row]:
        """Those that have slots, in their order."""
        return self.rows if self.partial is None else [*self.rows, self.partial]

    def _report(self, rows: list[Row], chosen: list[int], logprobs: dict[int, torch.Tensor]) -> list[Token]:
        """Appends the chosen tokens to their rows, and takes out the rows that end with them."""
        answers, ended = [], []
        for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            request = row.request
            extra = _likeliest(logprobs[index], token, request.logprobs or 0) if index in logprobs else {}
            if not row.begun:
                extra["reused"] = row.reused
            if token in self.stop_ids:
                answers.append(Token(request.id, None, "stop", **extra))
                ended.append(row)
                continue
            row.ids.append(token)
            full = len(row.ids) == len(request.ids) + request.max_new_tokens
            answers.append(Token(request.id, token, "length" if full else None, **extra))
            if full:
                ended.append(row)
        if ended:
            self._take_out(ended)
        return answers

    def _take_out(self, leaving: Sequence[Row]) -> None:
        """Frees rows' slots. Those that stay move into them from the end, each once, so that the rows in use are the first ones."""
        for slot, row in enumerate(self._placed):
            if row in leaving:
                self._keep(row, slot)
        had = len(self.rows)
        if self.partial in leaving:
            self.partial = None
        count = had - sum(row in leaving for row in self.rows)
        free = iter([slot for slot in range(count) if self.rows[slot] in leaving])
        for slot in range(count, had):
            row = self.rows[slot]
            if row not in leaving:
                target = next(free)
                self.cache.move(slot, target, row.start)
                self.rows[target] = row
        del self.rows[count:]
        if self.partial is not None and count < had:
            self.cache.move(had, count, self.partial.start)

    def _keep(self, row: Row, slot: int) -> None:
        """What was computed, for the next turn of its dialogue."""
        if self.prefix_cache.capacity and row.cached:
            start = row.start - row.cached
            self.prefix_cache.add(
                row.request.prefix, row.ids[: row.cached], self.cache.take(slot, start, start + row.cached)
            )

    def _shrink(self, joining: list[Row], error: Exception) -> None:
        """Halves the batch and puts all rows back into the queue; what they have generated stays."""
        rows = sorted({*self._placed, *joining}, key=lambda row: row.number)
        for row in rows:
            row.cached = 0
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
        self.budget.ran_out(len(rows), max(row.reach for row in rows))


def _likeliest(logprobs_V: torch.Tensor, token: int, count: int) -> dict:
    """The report on one choice, as fields of Token."""
    values, tokens = logprobs_V.topk(count)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return {"logprob": float(logprobs_V[token]), "top": top}
