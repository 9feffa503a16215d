"""`generate` with a prefix equals decoding by hand, one row at a time and without a cache."""

import pytest
import torch

NEW = 12


@pytest.fixture(scope="module")
def batch(golden):
    return {"input_ids": golden["padded.input_ids"], "attention_mask": golden["padded.attention_mask"]}


def options(**more):
    return {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | more


def row_alone(batch, row):
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


@torch.no_grad()
def greedy_by_hand(model, input_ids):
    for _ in range(NEW):
        best = model(input_ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, best), dim=1)
    return input_ids[0, -NEW:].tolist()


@torch.no_grad()
def beams_by_hand(model, input_ids, width):
    """(sequence, summed log probability) of every beam, best first; no beam can end before its length is up."""
    beams = [(input_ids[0], 0.0)]
    for _ in range(NEW):
        grown = []
        for ids, score in beams:
            top = model(ids[None], use_cache=False).logits[0, -1].log_softmax(-1).topk(width)
            grown += [
                (torch.cat((ids, i[None])), score + p.item()) for p, i in zip(top.values, top.indices, strict=True)
            ]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return [(ids[-NEW:].tolist(), score) for ids, score in beams]


@pytest.mark.parametrize("prefix", [None, "embedding", "projection"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy(batch, load_tiny, prefix, cache, attention):
    model = load_tiny(prefix, attention)
    how = {"dynamic": {}, "none": {"use_cache": False}}
    how["static"] = {"cache_implementation": "static", "disable_compile": True}
    new = model.generate(**batch, **options(**how[cache]))[:, -NEW:]
    assert new.tolist() == [greedy_by_hand(model, row_alone(batch, row)) for row in range(len(new))]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(batch, load_tiny, cache):
    model = load_tiny("embedding")
    how = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    out = model.generate(**batch, **options(**how))
    for row in range(3):
        expected = beams_by_hand(model, row_alone(batch, row), 3)
        assert out.sequences[3 * row : 3 * row + 3, -NEW:].tolist() == [ids for ids, _ in expected]
        scores = [score / NEW for _, score in expected]
        assert out.sequences_scores[3 * row : 3 * row + 3].tolist() == pytest.approx(scores, abs=1e-4)


def test_sampling_with_several_sequences_a_row(batch, load_tiny):
    model = load_tiny("embedding")
    how = {"do_sample": True, "num_return_sequences": 4, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    out = model.generate(**batch, **options(**how))
    assert out.sequences.shape == (12, 14 + NEW)
    assert len({tuple(row) for row in out.sequences[:4, -NEW:].tolist()}) == 4
    logits = torch.stack(out.logits, dim=1)
    with torch.no_grad():
        for row in range(12):
            alone = torch.cat((row_alone(batch, row // 4)[0], out.sequences[row, -NEW:]))[None]
            expected = model(alone, use_cache=False).logits[0, -NEW - 1 : -1]
            assert (logits[row] - expected).abs().max() <= 2e-5


def test_sampling_is_repeatable_and_sees_the_prefix(batch, load_tiny):
    drawn = []
    for prefix in ("embedding", "embedding", None):
        torch.manual_seed(3)
        drawn.append(load_tiny(prefix).generate(**batch, **options(do_sample=True))[:, -NEW:].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
