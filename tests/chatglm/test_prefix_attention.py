"""Every attention implementation sees the prefix, in every form of batch and with every cache."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import DynamicCache, StaticCache

from ptuning.chatglm import attention as attention_module
from ptuning.chatglm.modeling import positions_of

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
CACHES = {"dynamic": DynamicCache, "static": StaticCache}
TOLERANCE = 2e-5


def flash_by_hand(
    query, key, value, attention_mask, query_length, is_causal, dropout, softmax_scale, attn_implementation
):
    """What a flash kernel computes: lower-right causal, grouped heads, a two-dimensional mask that may be shorter than
    a static cache. (B, S, H, D) in and out."""
    assert attn_implementation in ("flash_attention_2", "flash_attention_3")
    assert is_causal and query_length == query.shape[1] and dropout == 0.0
    if attention_mask is not None:
        key, value = key[:, : attention_mask.shape[1]], value[:, : attention_mask.shape[1]]
    groups = query.shape[2] // key.shape[2]
    key, value = (part.transpose(1, 2).repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query.transpose(1, 2) @ key.mT * softmax_scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def load(load_tiny, monkeypatch):
    """`load(implementation)`: the golden model with its prefix on that implementation, runnable on a CPU and without a
    compiler: flex attention uncompiled, flash attention computed by hand."""

    def load(implementation: str, prefix: str | None = "embedding"):
        if implementation == "flex_attention":
            monkeypatch.setattr(torch._dynamo.config, "disable", True)
            monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr(attention_module, "_flash_attention_forward", flash_by_hand)
        model = load_tiny(prefix)
        name = implementation if prefix is None else attention_module.prefixed_name(implementation)
        model.config._attn_implementation = name
        return model

    return load


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


@pytest.mark.parametrize("ends", [(11,), (4, 11), (3, 4, 8, 11), (1, 2, 11)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_rows_read_in_chunks(golden, load, implementation, cache, ends):
    if implementation.startswith("flash") and cache == "static":
        pytest.skip("transformers gives flash attention no mask for a static cache, with or without a prefix")
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
@pytest.mark.parametrize("prefix", [None, "embedding"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_left_padded_rows_read_in_chunks_without_position_ids(golden, load, implementation, prefix, cache, ends):
    if "fl" in implementation and prefix is None:
        pytest.skip("transformers' own implementation, nothing of ours")
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
    prefix = model.prefix_encoder(2, torch.float32)
    encoder = model.detach_prefix()
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


@pytest.mark.parametrize("given", ["attached", "per call"])
def test_an_implementation_that_would_ignore_the_prefix_raises(golden, load, given):
    model = load("sdpa")
    prefix = model.prefix_encoder(1, torch.float32) if given == "per call" else None
    if given == "per call":
        model.detach_prefix()
    model.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="'sdpa' would ignore the prefix; set it to 'prefix_sdpa'"):
        model(golden["full.input_ids"], prefix=prefix)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_bf16_base_keeps_an_fp32_prefix(golden, load_tiny, attention):
    model = load_tiny("embedding", attention, dtype=torch.bfloat16)
    assert model.prefix_encoder.embedding.weight.dtype == torch.float32
    logits = model(golden["full.input_ids"]).logits
    assert logits.dtype == torch.bfloat16
    exact = golden["prefix_embedding.full.logits"]
    assert (logits.float() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_autocast_casts_the_prefix_to_the_keys_dtype(golden, load_tiny):
    model = load_tiny("embedding")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(golden["train.input_ids"], labels=golden["train.labels"], loss_only=True)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(golden["train.prefix_embedding.losses"][0].item(), rel=0.01)
    gradient, exact = model.prefix_encoder.embedding.weight.grad, golden["train.prefix_embedding.grad0"]
    assert gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.99


def prefix_gradient(model, golden):
    model.zero_grad()
    model(golden["train.input_ids"], labels=golden["train.labels"], loss_only=True).loss.backward()
    return model.prefix_encoder.embedding.weight.grad.clone()


@pytest.mark.parametrize("how", [None, {"use_reentrant": False}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_gradient_checkpointing_changes_no_gradient(golden, load, implementation, how):
    model = load(implementation).train()
    model.prefix_encoder.eval()
    plain = prefix_gradient(model, golden)
    assert (plain - golden["train.prefix_embedding.grad0"]).abs().max() <= 1e-6
    model.activation_checkpointing_enable(how)  # None is what the Trainer gives when its user says nothing
    assert torch.equal(prefix_gradient(model, golden), plain)


def test_gradient_checkpointing_repeats_the_same_dropout(golden, load):
    model, gradients = load("sdpa").train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)
        gradients.append(prefix_gradient(model, golden))
    assert torch.equal(*gradients)
    assert (gradients[0] - golden["train.prefix_embedding.grad0"]).abs().max() > 1e-4, "dropout is on"


def test_reentrant_checkpointing_fails_aloud(golden, load):
    model = load("sdpa").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        prefix_gradient(model, golden)


@pytest.mark.slow
def test_compiled_forward(golden, load_tiny):
    model = load_tiny("embedding")
    compiled = torch.compile(model)
    try:
        with torch.no_grad():
            logits = compiled(golden["full.input_ids"]).logits
            padded = compiled(golden["padded.input_ids"], attention_mask=golden["padded.attention_mask"]).logits
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working compiler here: {str(error).splitlines()[0]}")
    assert (logits - golden["prefix_embedding.full.logits"]).abs().max() <= TOLERANCE
    padded = padded * golden["padded.attention_mask"][:, :, None]
    assert (padded - golden["prefix_embedding.padded.logits"]).abs().max() <= TOLERANCE
