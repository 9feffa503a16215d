"""Every attention implementation sees the prefix, in every form of batch and with every cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ptuning.families.positions import positions_of
from ptuning.methods.prefix import attention as attention_module
from ptuning.methods.prefix.attach import detach_prefix, prefix_of

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
CACHES = ["dynamic", "static"]
TOLERANCE = 2e-5


def in_chunks(model, input_ids, ends, cache, mask=None):
    logits, start = [], 0
    for end in ends:
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        logits.append(model(input_ids[:, start:end], past_key_values=cache, use_cache=True, **given).logits)
        start = end
    return torch.cat(logits, dim=1)


def new_cache(kind, model):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_full_and_padded_rows(golden, load, implementation):
    model = load(implementation)
    logits = model(golden["full.input_ids"]).logits
    assert (logits - golden["prefix_embedding.full.logits"]).abs().max() <= TOLERANCE
    mask = golden["padded.attention_mask"]
    logits = model(golden["padded.input_ids"], attention_mask=mask).logits * mask[:, :, None]
    assert (logits - golden["prefix_embedding.padded.logits"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("given_mask", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_right_padded_rows_equal_rows_alone(golden, load, implementation, given_mask):
    model, input_ids = load(implementation), golden["full.input_ids"].clone()
    input_ids[1, 7:] = 0
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    logits = model(input_ids, attention_mask=mask if given_mask else None).logits
    assert (logits[0] - golden["prefix_embedding.full.logits"][0]).abs().max() <= TOLERANCE
    assert (logits[1, :7] - golden["prefix_embedding.full.logits"][1, :7]).abs().max() <= TOLERANCE


# transformers gives flash attention no mask for a static cache that is not full, with or without a prefix.
@pytest.mark.parametrize(
    ("implementation", "cache"),
    [(name, cache) for name in IMPLEMENTATIONS for cache in CACHES if cache == "dynamic" or "flash" not in name],
)
@pytest.mark.parametrize("ends", [(11,), (4, 11), (3, 4, 8, 11), (1, 2, 11)])
@torch.no_grad()
def test_rows_read_in_chunks(golden, load, implementation, cache, ends):
    model = load(implementation)
    logits = in_chunks(model, golden["full.input_ids"], ends, new_cache(cache, model))
    assert (logits - golden["prefix_embedding.full.logits"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_rows_read_in_chunks_without_a_prefix(golden, load, implementation, cache):
    model = load(implementation, prefix=None)
    logits = in_chunks(model, golden["full.input_ids"], (3, 4, 8, 11), new_cache(cache, model))
    assert (logits - golden["base.full.logits"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("ends", [(14,), (9, 14), (6, 7, 11, 14)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("prefix", "implementation"), [(None, "eager"), (None, "sdpa"), *(("embedding", name) for name in IMPLEMENTATIONS)]
)
@torch.no_grad()
def test_left_padded_rows_read_in_chunks_without_position_ids(golden, load, implementation, prefix, cache, ends):
    model, mask = load(implementation, prefix), golden["padded.attention_mask"]
    assert mask[:, 0].min() == 0, "some row starts with padding"
    logits = in_chunks(model, golden["padded.input_ids"], ends, new_cache(cache, model), mask) * mask[:, :, None]
    expected = golden["base.padded.logits" if prefix is None else "prefix_embedding.padded.logits"]
    assert (logits - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_mask_as_long_as_the_static_cache(golden, load):
    model, mask = load("sdpa"), golden["padded.attention_mask"]
    cache, whole = StaticCache(model.config, max_cache_len=20), torch.nn.functional.pad(mask, (0, 6), value=1)
    parts = [
        model(golden["padded.input_ids"][:, part], attention_mask=whole, past_key_values=cache, use_cache=True).logits
        for part in (slice(0, 9), slice(9, 14))
    ]
    logits = torch.cat(parts, dim=1) * mask[:, :, None]
    assert (logits - golden["prefix_embedding.padded.logits"]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_given_four_dimensional_mask(golden, load):
    mask = golden["padded.attention_mask"]
    visible = mask[:, None, None, :].bool() & torch.ones(14, 14, dtype=torch.bool).tril()
    for implementation in ("eager", "sdpa"):
        given = visible
        if implementation == "eager":
            given = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        model = load(implementation)
        logits = model(golden["padded.input_ids"], attention_mask=given, position_ids=positions_of(mask)).logits
        difference = (logits * mask[:, :, None]) - golden["prefix_embedding.padded.logits"]
        assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_prefix_given_per_call_equals_the_attached_one(golden, load, implementation):
    model = load(implementation)
    prefix = prefix_of(model)(2, torch.float32)
    encoder = detach_prefix(model)
    model.config._attn_implementation = attention_module.prefixed_name(implementation)
    bare = model(golden["full.input_ids"]).logits
    assert (bare - golden["base.full.logits"]).abs().max() <= TOLERANCE, "without a prefix it is plain attention"
    logits = model(golden["full.input_ids"], prefix=prefix).logits
    assert (logits - golden["prefix_embedding.full.logits"]).abs().max() <= TOLERANCE
    # Each row may have its own: row 0 another one, row 1 the golden one.
    mixed = [tuple(torch.cat((part + 1, part)) for part in pair) for pair in encoder(1, torch.float32)]
    logits = model(golden["full.input_ids"], prefix=mixed).logits
    assert (logits[1] - golden["prefix_embedding.full.logits"][1]).abs().max() <= TOLERANCE
    assert (logits[0] - golden["prefix_embedding.full.logits"][0]).abs().max() > 0.01


def test_an_implementation_that_would_ignore_the_prefix_raises(golden, load):
    model = load("sdpa")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="'sdpa' would ignore the prefix; set it to 'prefix_sdpa'"):
        model(golden["full.input_ids"])
