"""Long prompts in pieces: the same tokens, memory that grows with the length, and no answer that stands still meanwhile."""

import random
from dataclasses import replace

import pytest
import torch

from ptuning.generation import Engine, GenerationRequest, Prefix, together
from ptuning.generation import engine as engine_module
from ptuning.generation.pace import PAUSE, Pace
from ptuning.generation.together import spans
from ptuning.methods.prefix.attach import prefix_of
from tests.generation.conftest import added_at_random, answers
from tests.generation.test_engine import out_of_memory_above, some_requests


@pytest.mark.parametrize("piece", [1, 5, 16])
@pytest.mark.parametrize("name", ["base", "prefix_embedding", "prefix_projection"])
def test_golden_greedy_tokens(golden, load_tiny, name, piece):
    model = load_tiny(name.removeprefix("prefix_") if name != "base" else None)
    prefix = None if name == "base" else Prefix.of(name, prefix_of(model), model.dtype)
    rows = zip(golden["padded.input_ids"], golden["padded.attention_mask"], strict=True)
    requests = [
        GenerationRequest(i, ids[mask.bool()].tolist(), 24, prefix=prefix) for i, (ids, mask) in enumerate(rows)
    ]
    with Engine(model, [2], prefill_tokens=piece) as engine:
        found = answers(engine, requests)
    for index, ids in enumerate(golden[f"{name}.padded.greedy"][:, -24:].tolist()):
        assert found[index] == (ids[: ids.index(2)] if 2 in ids else ids)


@pytest.mark.parametrize(("pause", "together"), [(None, False), (2.0, False), (2.0, True)])
@pytest.mark.parametrize(("piece", "max_rows", "past"), [(1, 64, 0), (7, 64, 0), (7, 4, 500), (20, 3, 0)])
def test_any_mixture_equals_one_by_one(
    model, prefixes, one_by_one, monkeypatch, piece, max_rows, past, pause, together
):
    """Where prompts come first, take turns with running rows (a family with a kernel of its own), or are computed with them."""
    requests = some_requests(prefixes)
    draw, found = random.Random(1), {request.id: [] for request in requests}
    partial, forward, layouts = 0, model.forward, []
    monkeypatch.setattr(model, "forward", lambda **given: layouts.append(given.get("layout")) or forward(**given))
    if not together:
        monkeypatch.setattr(engine_module, "allow_together", lambda config: False)
    with Engine(model, [2], max_rows=max_rows, prefill_tokens=piece, pause=pause, prefix_cache_tokens=past) as engine:
        for _ in added_at_random(engine, requests, draw, found):
            partial += engine.partial is not None and bool(engine.rows)
            assert len(engine.rows) + (engine.partial is not None) <= max_rows
    monkeypatch.undo()
    assert found == {request.id: one_by_one(request) for request in requests}
    assert partial > 3  # so rows have left and a prompt has moved along
    assert (sum(layout is not None for layout in layouts) > 5) == together


def test_memory_grows_with_the_length_not_with_its_square(model, monkeypatch):
    masks, forward = [], model.forward

    def watched(input_ids, attention_mask, **kwargs):
        masks.append(attention_mask.numel())
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    with Engine(model, [], prefill_tokens=16) as engine:
        for length in (100, 200):
            masks.clear()
            answers(engine, [GenerationRequest(length, [5 + n % 300 for n in range(length)], 1)])
            assert len(masks) == -(-length // 16) and max(masks) <= 16 * length


def test_what_a_piece_computes_is_kept_when_its_request_is_cancelled(model, one_by_one):
    long = GenerationRequest("long", list(range(5, 105)), 5)
    with Engine(model, [2], prefill_tokens=40, prefix_cache_tokens=1000) as engine:
        engine.add(long)
        engine.step()
        assert engine.partial is not None and engine.partial.cached == 40
        assert engine.cancel("long") and not engine.cancel("long") and engine.partial is None
        assert engine.prefix_cache.longest(None, long.ids).shape[3] == 40
        assert not engine.has_work
        found = answers(engine, [replace(long, id="again")])
    assert found["again"] == one_by_one(long)


@pytest.mark.parametrize("where", ["in the rows' step", "in a piece"])
def test_when_memory_runs_out_a_prompt_in_pieces_isnt_lost(model, one_by_one, monkeypatch, where):
    requests = [GenerationRequest(n, [5 + n] * 3, 8) for n in range(3)]
    long, said = GenerationRequest("long", list(range(5, 105)), 5), []
    expected = {request.id: one_by_one(request) for request in [*requests, long]}
    forward, failing = model.forward, [1]

    def fails_once(input_ids, **kwargs):
        with_piece = kwargs.get("layout") is not None
        if failing and engine.partial is not None and with_piece == (where == "in a piece"):
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", fails_once)
    if where == "in the rows' step":
        monkeypatch.setattr(engine_module, "allow_together", lambda config: False)
    with Engine(model, [2], prefill_tokens=40, pause=1.0, notify=said.append) as engine:
        assert answers(engine, [*requests, long]) == expected
    assert not failing and "memory ran out with 4 rows" in said[0]


def test_a_row_that_runs_out_of_memory_alone_is_named_in_any_piece(model, monkeypatch):
    monkeypatch.setattr(model, "forward", out_of_memory_above(0, model.forward))
    with Engine(model, [], prefill_tokens=40) as engine:
        engine.add(GenerationRequest("long", [5] * 100, 3))
        with pytest.raises(Exception, match="100 tokens with 3 new ones doesn't fit into memory even alone"):
            engine.step()
        assert not engine.has_work


class Machine:
    """A clock that goes on with every forward call, by what it would take: 10 s, 1 s a row, 0.2 s a prompt token."""

    def __init__(self, model, monkeypatch):
        self.now, forward = 0.0, model.forward

        def timed(input_ids, **kwargs):
            (rows, width), layout = input_ids.shape, kwargs.get("layout")
            if layout is not None:
                self.now += 10 + layout.rows + 0.2 * (rows - layout.rows)
            else:
                self.now += 10 + rows * (1 if width == 1 else 0.2 * width)
            return forward(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", timed)

    def clock(self) -> float:
        return self.now


def serve(machine, model, pause, prompts):
    """Two streams, and after some of their tokens 20 prompts at once. Returns the largest gap between tokens of a stream before
    and after these came, until the streams end, and the seconds until all is done."""
    with Engine(model, [], pause=pause) as engine:
        engine.pace = Pace(2048, pause, machine.clock)
        for stream in ("a", "b"):
            engine.add(GenerationRequest(stream, [5, 6, 7], 60))
        latest, gaps, started = {}, ([], []), machine.now
        for step in range(10_000):
            if step == 20:
                for number in range(prompts):
                    engine.add(GenerationRequest(number, [5 + number] * 140, 60))
            for token in engine.step():
                if token.id in ("a", "b"):
                    if token.id in latest:
                        gaps[step >= 20].append(machine.now - latest[token.id])
                    latest[token.id] = machine.now
            if not engine.has_work:
                break
        return max(gaps[0]), max(gaps[1]), machine.now - started


def test_streams_go_on_while_many_prompts_arrive(model, monkeypatch):
    """In the time of a machine that is always the same; what decides is the order of steps."""
    machine = Machine(model, monkeypatch)
    without, with_prompts, seconds = serve(machine, model, PAUSE, 20)
    assert with_prompts <= 3 * without
    _, frozen, fastest = serve(machine, model, None, 20)
    assert frozen > 20 * without
    assert seconds < 1.3 * fastest  # the price on a machine where a step of one row costs nearly what one of many does


def test_rows_that_end_together_move_the_others_once(model, one_by_one, monkeypatch):
    """Each move copies all that a row has; a prompt in part was moved by one slot for each row that ended."""
    requests = [GenerationRequest(n, [5 + n, 9, 40 + n], 12 if n in (2, 6) else 4) for n in range(7)]
    requests.append(GenerationRequest("long", [5 + n % 300 for n in range(300)], 5))
    moves = []
    with Engine(model, [2], pause=2.0) as engine:
        engine.pace = Pace(2048, 2.0, lambda: 0.0)
        move = engine.cache.move
        monkeypatch.setattr(engine.cache, "move", lambda *given: moves.append(given[:2]) or move(*given))
        assert answers(engine, requests) == {request.id: one_by_one(request) for request in requests}
    assert moves[:3] == [(2, 0), (6, 1), (7, 2)]


def test_short_rows_are_computed_apart_from_long_ones(model, one_by_one, monkeypatch):
    """In any order of short and long; the same answers."""
    cpu = torch.device("cpu")
    assert spans([60] * 16 + [1400] * 4, cpu) == [(0, 16, 60), (16, 20, 1400)]
    assert spans([1400, 60, 1400, 60], cpu) == [(0, 1, 1400), (1, 2, 60), (2, 3, 1400), (3, 4, 60)]
    assert spans([100, 300, 200], cpu) == [(0, 3, 300)]
    monkeypatch.setitem(together._CALL, "cpu", 10)
    draw, layouts, forward = random.Random(2), [], model.forward
    lengths = [5, 90, 7, 120, 60, 6, 80, 9]
    requests = [
        GenerationRequest(number, [draw.randrange(3, 320) for _ in range(length)], 20)
        for number, length in enumerate(lengths)
    ]
    expected = {request.id: one_by_one(request) for request in requests}
    monkeypatch.setattr(model, "forward", lambda **given: layouts.append(given.get("layout")) or forward(**given))
    for pause in (None, 2.0):
        layouts.clear()
        with Engine(model, [2], pause=pause) as engine:
            assert answers(engine, requests) == expected
        assert max(len(layout.spans) for layout in layouts if layout is not None) > 3
