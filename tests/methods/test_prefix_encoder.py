"""The prefix's parameters, layout, dropout, and rotation."""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from ptuning.families.chatglm2.family import rotate_interleaved
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix, prefix_of
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape

SHAPE = PrefixShape(num_layers=3, num_key_value_heads=2, head_dim=4, hidden_size=10)
T = 5


def test_layout_key_of_layer_0_value_of_layer_0_key_of_layer_1():
    encoder = PrefixEncoder(SHAPE, T).eval()
    rows = encoder.embedding.weight
    assert rows.shape == (T, 3 * 2 * 2 * 4)
    pairs = encoder(1, torch.float32)
    assert len(pairs) == 3
    for layer, pair in enumerate(pairs):
        for which, part in enumerate(pair):
            assert part.shape == (1, 2, T, 4)
            for group in range(2):
                start = ((layer * 2 + which) * 2 + group) * 4
                assert torch.equal(part[0, group], rows[:, start : start + 4])


def test_projection_is_linear_tanh_linear():
    encoder = PrefixEncoder(SHAPE, T, prefix_projection=True).eval()
    assert set(encoder.state_dict()) == {
        "embedding.weight",
        *(f"trans.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
    }
    weights = encoder.state_dict()
    hidden = torch.tanh(weights["embedding.weight"] @ weights["trans.0.weight"].T + weights["trans.0.bias"])
    rows = hidden @ weights["trans.2.weight"].T + weights["trans.2.bias"]
    key = encoder(1, torch.float32)[0][0]
    assert torch.allclose(key[0, 0], rows[:, :4], atol=1e-6)


def test_parameters_stay_fp32_and_the_output_has_the_bases_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        encoder = PrefixEncoder(SHAPE, T, prefix_projection=True)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert {part.dtype for pair in encoder(2, torch.bfloat16) for part in pair} == {torch.bfloat16}


def test_dropout_is_each_rows_own_and_scales_by_the_keep_probability():
    torch.manual_seed(0)
    encoder = PrefixEncoder(PrefixShape(8, 2, 32, 10), 64)
    torch.nn.init.constant_(encoder.embedding.weight, 3.0)
    encoder.train()
    kept = torch.stack([torch.stack(pair) for pair in encoder(4, torch.float32)])  # (L, 2, B, G, T, D)
    assert kept.shape == (8, 2, 4, 2, 64, 32)
    values = kept.unique()
    assert values.tolist() == pytest.approx([0.0, 3.0 / 0.9])
    share = (kept != 0).float().mean().item()
    assert share == pytest.approx(0.9, abs=0.005)  # 262,144 draws: a standard deviation of 0.0006
    for other in range(1, 4):
        assert not torch.equal(kept[:, :, 0], kept[:, :, other])
        # independent masks agree on 0.9² + 0.1² of the places
        agree = ((kept[:, :, 0] != 0) == (kept[:, :, other] != 0)).float().mean().item()
        assert agree == pytest.approx(0.82, abs=0.01)


def test_no_dropout_in_eval():
    encoder = PrefixEncoder(SHAPE, T).eval()
    for pair in encoder(4, torch.float32):
        assert all(part.shape[0] == 1 for part in pair)
    first, second = encoder(4, torch.float32), encoder(4, torch.float32)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("offset", [1, 8, 128, 4096])
def test_rotating_forth_and_back_is_the_identity(offset):
    inv_freq = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    keys = torch.randn(128, 2, 128, generator=torch.Generator().manual_seed(offset))
    there = rotate_interleaved(keys, offset, inv_freq)
    assert not torch.allclose(there, keys, atol=1e-2)
    assert torch.allclose(rotate_interleaved(there, -offset, inv_freq), keys, atol=1e-6)
    assert torch.equal(there[..., 64:], keys[..., 64:]), "the second half of a head carries no rotary"
    assert torch.allclose(there.norm(dim=-1), keys.norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("offset", [0, 3, 200])
def test_rotating_equals_the_models_own_rotary(load_tiny, offset):
    rotary = load_tiny().model.rotary_emb
    keys = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary(keys, torch.full((1, 8), offset))
    _, expected = apply_rotary_pos_emb(keys, keys, cos, sin)
    assert torch.allclose(rotate_interleaved(keys, offset, rotary.inv_freq), expected, atol=1e-5)


def test_attach_and_detach(golden, load_tiny):
    model = load_tiny("embedding")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "prefix_encoder.embedding.weight"
    ]
    assert model.config._attn_implementation == "prefix_sdpa"
    encoder = detach_prefix(model)
    assert isinstance(encoder, PrefixEncoder)
    assert prefix_of(model) is None and model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert (model(golden["full.input_ids"]).logits - golden["base.full.logits"]).abs().max() <= 1e-6
    assert attach_prefix(model, 4).training is model.training
    assert attach_prefix(model.train(), 4).training is True
    assert model.config._attn_implementation == "prefix_sdpa", "attaching twice must not stack the name"
