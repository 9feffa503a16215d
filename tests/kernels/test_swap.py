"""A model with these kernels: what is replaced, the same losses and gradients in training, all as it was in evaluation."""

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from ptuning.families import Family, family, family_of
from ptuning.families.logits import loss_of
from ptuning.kernels import ONEDNN, TORCH, products, swap
from ptuning.kernels.attention import SplitAttention
from ptuning.kernels.elementwise import LeanFeedForward, LeanNorm
from ptuning.kernels.product import FrozenLinear
from ptuning.loading import load_base
from ptuning.methods.lora.attach import attach_lora, lora_parameters, without_lora
from ptuning.methods.prefix.attach import prefix_of, without_prefix
from ptuning.quantization import precision_of

PREFIXES = ("embedding", "projection")


def step(model, golden):
    """Loss and gradients of what trains."""
    model.zero_grad()
    loss = loss_of(model, golden["train.input_ids"], golden["train.labels"])
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def training(model):
    model.train()
    if prefix_of(model) is not None:
        prefix_of(model).eval()  # dropout off
    return model


def close(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("product", products())
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_step_of_a_prefix(golden, load_tiny, prefix, product, checkpointing):
    model = training(load_tiny(prefix))
    expected = step(model, golden)
    swap(model, product)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    close(step(training(model), golden), expected)
    official = golden[f"train.prefix_{prefix}.grad0" + (".embedding" if prefix == "projection" else "")]
    assert (prefix_of(model).embedding.weight.grad - official).abs().max() <= 1e-6


def test_what_is_replaced(load_tiny):
    model = load_tiny("embedding")
    names = dict(model.named_parameters()).keys()
    swap(model, ONEDNN)
    layer = model.model.layers[0]
    for part, kind in (
        (layer.input_layernorm, LeanNorm),
        (layer.post_attention_layernorm, LeanNorm),
        (model.model.norm, LeanNorm),
        (layer.mlp, LeanFeedForward),
        (layer.mlp.down_proj, FrozenLinear),
        (layer.self_attn.q_proj, FrozenLinear),
        (model.lm_head, FrozenLinear),
    ):
        assert isinstance(part, kind)
    assert isinstance(layer.input_layernorm, family_of(model.config).norm)
    assert dict(model.named_parameters()).keys() == names
    plain = load_tiny("embedding")
    swap(plain, TORCH)
    assert not any(isinstance(part, FrozenLinear) for part in plain.modules())


@pytest.mark.parametrize("product", products())
def test_in_evaluation_mode_it_is_transformers_own(golden, load_tiny, product):
    model = load_tiny("embedding")
    swap(model, product)
    with torch.no_grad():
        found = model(golden["full.input_ids"]).logits
        assert torch.equal(found, load_tiny("embedding")(golden["full.input_ids"]).logits)
        with without_prefix(model):
            assert torch.equal(model(golden["full.input_ids"]).logits, load_tiny()(golden["full.input_ids"]).logits)
        assert torch.equal(model(golden["full.input_ids"]).logits, found)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = golden["padded.attention_mask"]
    answers = [
        each.generate(golden["padded.input_ids"], attention_mask=mask, **greedy)
        for each in (model, load_tiny("embedding"))
    ]
    assert torch.equal(*answers)


def test_rows_padded_on_the_left_have_their_mask_while_training(golden, load_tiny, monkeypatch):
    monkeypatch.setattr(SplitAttention, "forward", lambda *a: pytest.fail("used where a mask is needed"))
    model, mask = load_tiny("embedding"), golden["padded.attention_mask"]
    expected = model(golden["padded.input_ids"], attention_mask=mask).logits
    swap(model, TORCH)
    found = training(model)(golden["padded.input_ids"], attention_mask=mask).logits
    assert ((found - expected) * mask[:, :, None]).abs().max() <= 1e-5


def test_each_kernel_computes(golden, load_tiny, monkeypatch):
    """Else the comparisons above would be of one thing with itself."""
    model = training(load_tiny("embedding"))
    swap(model, products()[-1])
    names, pending = set(), [loss_of(model, golden["train.input_ids"], golden["train.labels"]).grad_fn]
    while pending:
        node = pending.pop()
        names.add(type(node).__name__)
        pending += [following for following, _ in node.next_functions if following is not None]
    expected = {"RMSNormBackward", "SwiGLUBackward", "SplitAttentionBackward"}
    assert expected <= names
    assert ("FrozenProductBackward" in names) == (ONEDNN in products())
    assert not any("ScaledDotProduct" in name for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("product", products())
def test_a_step_of_a_lora(golden, load_tiny, product, targets):
    torch.manual_seed(0)
    model = load_tiny()
    attach_lora(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=targets))
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))  # both factors count
    with torch.no_grad():
        answers = model(golden["full.input_ids"]).logits
    expected = step(model.train(), golden)
    swap(model, product)
    close(step(model, golden), expected)
    assert not any(isinstance(part, FrozenLinear) for name, part in model.named_modules() if "lora_" in name)
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, FrozenLinear) == (product == ONEDNN)
    with torch.no_grad():
        assert torch.equal(model.eval()(golden["full.input_ids"]).logits, answers)
        with without_lora(model):
            assert torch.equal(model(golden["full.input_ids"]).logits, load_tiny()(golden["full.input_ids"]).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_on_a_quantised_base(golden, golden_dir, bits):
    model = load_base(golden_dir / "chatglm2-tiny", device="cpu", precision=precision_of(bits))
    attach_lora(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj"]))
    expected = step(model.train(), golden)
    swap(model, products()[-1])
    close(step(model, golden), expected)
    assert isinstance(model.model.layers[0].mlp, LeanFeedForward)


class Small(Family):
    name = model_type = "llama"
    supported = template_name = "none"

    def register(self):
        pass

    def template(self, tokenizer):
        raise NotImplementedError


def test_another_family(monkeypatch):
    """Its norms are replaced; a feed-forward part of another kind stays."""
    monkeypatch.setitem(family._FAMILIES, "llama", Small())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).train()
    attach_lora(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj"]))
    ids = {"train.input_ids": torch.randint(3, 64, (2, 9)), "train.labels": torch.randint(3, 64, (2, 9))}
    expected = step(model, ids)
    swap(model, TORCH)
    close(step(model, ids), expected)
    assert isinstance(model.model.norm, LeanNorm)
    assert not any(isinstance(part, LeanFeedForward) for part in model.modules())


def test_a_gate_other_than_silu_stays(load_tiny):
    model = load_tiny()
    model.requires_grad_(False)
    model.config.hidden_act = "gelu"
    swap(model, TORCH)
    assert not any(isinstance(part, LeanFeedForward) for part in model.modules())
