"""The prefix on causal language models of other families: it asks only that attention goes through transformers' registry."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ptuning.families import Family, family
from ptuning.families.logits import loss_of
from ptuning.methods import bare, self_test
from ptuning.methods.prefix.attach import attach_encoder, attach_prefix, detach_prefix, prefix_of

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
PER_HEAD = {"llama": 16, "qwen2": 12}  # Qwen2's configuration doesn't say it
IDS = torch.tensor([[5, 9, 31, 7, 64, 2], [8, 8, 70, 41, 3, 95]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class SomeFamily(Family):
    """Llama's names and shapes, which the base class describes."""

    supported = "a tiny model"
    template_name = "none"

    def __init__(self, model_type: str):
        self.name = self.model_type = model_type

    def register(self) -> None:
        pass  # transformers knows it

    def template(self, tokenizer):
        raise NotImplementedError


@pytest.fixture(params=MODELS)
def bare_model(request, monkeypatch):
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    family.add_family(SomeFamily(request.param))
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():  # larger than transformers' 0.02, so that attention has something to say
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model


@pytest.fixture(params=["sdpa", "eager"])
def model(request, bare_model):
    bare_model.config._attn_implementation = request.param
    attach_prefix(bare_model, 5)
    return bare_model


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def gradient_of(model) -> torch.Tensor:
    model.zero_grad()
    loss_of(model, IDS, IDS).backward()
    return prefix_of(model).embedding.weight.grad.clone()


def with_keys_by_hand(model) -> torch.Tensor:
    """The logits with the prefix's raw keys and values put into the cache, which is what a prefix is."""
    encoder = detach_prefix(model)
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(encoder(1, torch.float32)):
        cache.update(key.expand(len(IDS), -1, -1, -1), value.expand(len(IDS), -1, -1, -1), layer)
    positions = torch.arange(IDS.shape[1])[None]  # real tokens count from 0, as in ChatGLM2
    with torch.no_grad():
        logits = model(IDS, past_key_values=cache, position_ids=positions).logits
    attach_encoder(model, encoder)
    return logits


def test_its_keys_and_values_are_seen_in_every_layer(model):
    assert prefix_of(model).embedding.weight.shape == (5, 3 * 2 * 2 * PER_HEAD[model.config.model_type])
    torch.testing.assert_close(logits_of(model), with_keys_by_hand(model), atol=1e-5, rtol=0)
    assert self_test(model) > 0.1


def test_detaching_restores_the_bare_logits_exactly(bare_model):
    before, names = logits_of(bare_model), list(bare_model.state_dict())
    attach_prefix(bare_model, 5)
    assert not torch.equal(logits_of(bare_model), before)
    with bare(bare_model):
        assert torch.equal(logits_of(bare_model), before)
    assert detach_prefix(bare_model) is not None
    assert torch.equal(logits_of(bare_model), before) and list(bare_model.state_dict()) == names


def test_training_it_lowers_the_loss_and_leaves_the_base_alone(model):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "prefix_encoder" not in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained == list(prefix_of(model).parameters())
    optimizer, losses = torch.optim.AdamW(trained, lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, IDS, IDS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if name in base)


def test_gradient_checkpointing_changes_no_gradient(model):
    model.train()
    prefix_of(model).eval()  # no dropout
    plain = gradient_of(model)
    assert plain.abs().max() > 1e-3
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradient_of(model), plain)


def test_generate_sees_it(model):
    answers = model.generate(IDS, **GREEDY)
    ids = IDS
    for _ in range(6):  # by hand and without a cache
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(answers, ids)
    with bare(model):
        assert not torch.equal(model.generate(IDS, **GREEDY), answers)


def test_save_pretrained_leaves_it_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "prefix" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    detach_prefix(model)
    options = {"attn_implementation": model.config._attn_implementation, "output_loading_info": True}
    again, info = type(model).from_pretrained(tmp_path, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits_of(again.eval()), logits_of(model))
