"""Each row draws its own numbers, whatever stands beside it."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

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


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(1, 20)
    chooser = Chooser(SamplingParams(repetition_penalty=1.7), prompt=(3, 5, 5))
    ids = [3, 5, 5]
    for _ in range(6):
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), logits.clone())
        ours = logits.clone()
        token = choose(ours, [chooser])[0]
        assert torch.equal(ours, expected) and token == int(expected.argmax())
        ids.append(token)


@pytest.mark.parametrize("temperature", [0.0, 0.001, 1.0])
@pytest.mark.parametrize("penalty", [2.7e-236, 1e-38, 1e-3])
def test_a_penalty_close_to_0_leaves_a_token_of_the_vocabulary(temperature, penalty):
    """Of the tokens that it lifts beyond all numbers; nothing that ends the process that answers for others too."""
    logits = torch.tensor([[4.0, 3.0, -1.0, 2.0]])
    chooser = Chooser(SamplingParams(temperature, repetition_penalty=penalty, seed=0), [1, 2, 3])
    assert {choose(logits.clone(), [chooser])[0] for _ in range(20)} <= {1, 3}


def test_min_p_drops_the_unlikely():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chooser = Chooser(SamplingParams(temperature=1.0, seed=1, min_p=0.4))
    assert {choose(logits[None].clone(), [chooser])[0] for _ in range(300)} == {0, 1}


class OnlyEven:
    """A constraint; each answer counts by itself."""

    def matcher(self):
        return OnlyEven.Matcher()

    class Matcher:
        def __init__(self):
            self.chosen = []

        def restrict(self, logits_V):
            logits_V[1::2] = float("-inf")
            logits_V[self.chosen] = float("-inf")  # and none twice

        def chose(self, token):
            self.chosen.append(token)


def test_a_constraint_holds_for_its_row_alone(model):
    rules = [
        SamplingParams(constraint=OnlyEven()),
        SamplingParams(2.0, seed=1, constraint=OnlyEven()),
        SamplingParams(),
    ]
    with Engine(model, [], max_rows=2) as engine:
        found = answers(engine, [GenerationRequest(i, [5, 6, 7], 10, rule) for i, rule in enumerate(rules)])
    with Engine(model, []) as engine:
        assert found[2] == answers(engine, [GenerationRequest(2, [5, 6, 7], 10)])[2]
    for ids in (found[0], found[1]):
        assert all(token % 2 == 0 for token in ids) and len(set(ids)) == 10
