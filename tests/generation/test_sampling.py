"""Each row draws its own numbers, whatever stands beside it."""

import pytest
import torch

from ptuning.generation import GREEDY, OFFICIAL, Engine, GenerationRequest, SamplingParams
from ptuning.generation.sampling import Chooser, choose
from tests.generation.conftest import answers


def sampled(model, max_rows: int, batch_tokens: int = 16384) -> dict:
    requests = [
        GenerationRequest(
            seed, [5 + seed, 6, 7] * (1 + seed % 3), 12, SamplingParams(temperature=1.5, top_p=0.95, seed=seed)
        )
        for seed in range(10)
    ]
    with Engine(model, [2], max_rows=max_rows, batch_tokens=batch_tokens) as engine:
        return answers(engine, requests)


def test_the_same_seed_gives_the_same_answer_whatever_the_batch(model):
    together = sampled(model, 64)
    assert together == sampled(model, 3) == sampled(model, 1) == sampled(model, 64, batch_tokens=64)
    assert len({tuple(ids) for ids in together.values()}) == 10


def test_without_a_seed_two_answers_differ(model):
    rule = SamplingParams(temperature=2.0)
    with Engine(model, []) as engine:
        found = answers(engine, [GenerationRequest(i, [5, 6, 7], 20, rule) for i in range(2)])
    assert found[0] != found[1]


def test_drawn_frequencies_are_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    chooser = Chooser(SamplingParams(temperature=1.0, seed=1))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose(logits[None].clone(), [chooser])[0]] += 1
    assert (counts / 4000 - torch.tensor([0.5, 0.3, 0.2, 0.0])).abs().max() < 0.03
    assert counts[3] == 0


@pytest.mark.parametrize(
    "rule",
    [SamplingParams(1.0, top_k=1, seed=3), SamplingParams(1.0, top_p=1e-6, seed=3), SamplingParams(0.01, seed=3)],
)
def test_narrow_rules_are_greedy(rule):
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert choose(logits.clone(), [Chooser(rule)] * 5) == logits.argmax(-1).tolist()


def test_top_p_keeps_what_together_has_that_probability():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    chooser = Chooser(SamplingParams(1.0, top_p=0.8, seed=0))
    drawn = {choose(logits.clone(), [chooser])[0] for _ in range(200)}
    assert drawn == {0, 1}


def test_greedy_and_sampled_rows_stand_side_by_side():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits.clone(), [Chooser(GREEDY), Chooser(OFFICIAL), Chooser(GREEDY)])
    assert [chosen[0], chosen[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]


def test_penalties_are_openais():
    chooser = Chooser(SamplingParams(frequency_penalty=0.5, presence_penalty=0.25))
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    chosen = [choose(logits.clone(), [chooser])[0] for _ in range(4)]
    # 0 at 2.0, then 1.25; 1 at 1.9, then 1.15; 0 again, then 0.75; 1.
    assert chosen == [0, 1, 0, 1]
    penalised = logits[0].clone()
    chooser.penalise(penalised)
    assert penalised.tolist() == pytest.approx([2.0 - 2 * 0.5 - 0.25, 1.9 - 2 * 0.5 - 0.25, 0.0])
