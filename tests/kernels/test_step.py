"""A decode step as one program: the modules' numbers to the last bit, whatever is in the batch, and which models have one."""

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

from ptuning.config.options import ModelArguments
from ptuning.generation import Engine, GenerationRequest, Prefix
from ptuning.kernels import step_program
from ptuning.loading import load_base
from ptuning.methods import Companion, LoraMethod, detach, method_of
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
from ptuning.quantization import choose_kernels, precision_of
from tests.conftest import REPO
from tests.generation.conftest import answers
from tests.methods.test_lora import randomise

BASE = REPO / "models" / "chatglm2-tiny"


def packed(bits: int, dtype: str = "bfloat16", kernels: str = "fast", folder=BASE):
    model = load_base(folder, dtype=dtype, device="cpu", precision=precision_of(bits))
    choose_kernels(model, kernels, str)
    return model


@pytest.fixture(scope="module", params=[4, 8])
def model(request):
    return packed(request.param)


@pytest.fixture(scope="module")
def prefixes(model):
    torch.manual_seed(3)
    found = []
    for length in (8, 150):
        encoder = PrefixEncoder(PrefixShape.of(model.config), length)
        with torch.no_grad():
            encoder.embedding.weight.mul_(4)
        found.append(Prefix.of(f"prefix{length}", encoder, model.dtype))
    return found


class Same(Companion):
    """Changes nothing in the layers, but says that it might: its rows keep a step from being one program."""

    name = "same"

    def on(self, model, rows):
        return super().on(model, rows)


def requests(companions) -> list[GenerationRequest]:
    """They join and leave at other times; one outgrows the columns that there are at first."""
    return [
        GenerationRequest(n, list(range(5 + n, 9 + 11 * n)), 140 if n == 2 else 6 + 5 * n, prefix=companions[n % len(companions)])
        for n in range(7)
    ]  # fmt: skip


def logits_of(engine: Engine, asked: list[GenerationRequest]) -> list[torch.Tensor]:
    """Of each step of running rows, beside their answers."""
    found, compute = [], engine._compute.next_logits
    engine._compute.next_logits = lambda rows: found.append(compute(rows)) or found[-1]
    answers(engine, asked)
    return found


def test_it_equals_the_modules_to_the_last_bit(model, prefixes):
    companions = [None, *prefixes]
    with Engine(model, []) as engine:
        assert engine._compute.step is not None
        by_program = logits_of(engine, requests(companions))
    with Engine(model, []) as engine:
        by_modules = logits_of(engine, requests([Same(), *prefixes]))
    assert len(by_program) == len(by_modules) > 130
    assert all(torch.equal(one, other) for one, other in zip(by_program, by_modules, strict=True))


def test_it_is_near_the_exact_kernels(model):
    exact = packed(model.config.quantization_config.bits, kernels="exact")
    asked = [GenerationRequest(n, list(range(5 + n, 30 + n)), 2) for n in range(3)]
    with Engine(model, []) as fast, Engine(exact, []) as slow:
        assert slow._compute.step is None
        (near,), (true,) = logits_of(fast, asked), logits_of(slow, asked)
    assert 0 < (near - true).norm() / true.norm() < 0.05


def test_base_prefixes_and_a_lora_in_one_batch_answer_as_alone(model, prefixes):
    """Prompts are computed one by one: sdpa, which computes those, rounds a padded one otherwise in bf16."""
    asked = requests([None, *prefixes, random_lora(model)])
    with Engine(model, []) as engine:
        engine._compute.step = Counting(engine._compute.step)
        together = {each.id: [] for each in asked}
        for one_more in [*asked, None]:
            if one_more is not None:
                engine.add(one_more)
            while engine.waiting or (one_more is None and engine.has_work):
                for token in engine.step():
                    together[token.id].append(token.token)
        used = engine._compute.step.rows
        alone = {each.id: answers(engine, [each])[each.id] for each in asked}
    assert together == alone and used and max(used) > 1
    assert len({tuple(answer[:6]) for answer in together.values()}) > 3


def random_lora(model):
    method_of(ModelArguments(str(BASE), method="lora"), trains=True).start(model)
    randomise(model, seed=1)
    lora = LoraMethod.served(model.eval(), "lora")
    assert step_program(model) is None  # while a LoRA is on it
    detach(model)
    return lora


class Counting:
    """A program, and how many rows each of its steps had."""

    def __init__(self, program):
        self.operations, self._program, self.rows = program.operations, program, []

    def __call__(self, ids_N, *more):
        self.rows.append(len(ids_N))
        return self._program(ids_N, *more)


def test_a_row_beside_a_prompt_is_as_it_is_alone(model, prefixes):
    """To the last bit, though the prompt's pieces keep those steps from being one program."""
    first, *others = requests([None, *prefixes])
    first = GenerationRequest("first", first.ids, 40, prefix=prefixes[0])
    found: list[list[torch.Tensor]] = [[], []]
    for others_too, kept in enumerate(found):
        with Engine(model, [], pause=2.0, prefill_tokens=20) as engine:
            compute, beside = engine._compute, []
            plain, together = compute.next_logits, compute.logits_together
            compute.next_logits = lambda rows: keep(plain(rows), kept)  # noqa: B023
            compute.logits_together = lambda rows, *more: keep(together(rows, *more), kept, beside)  # noqa: B023
            engine.add(first)
            engine.step()
            for request in others if others_too else []:
                engine.add(request)
            while engine.has_work and engine.rows and engine.rows[0].request is first:
                engine.step()
            assert bool(beside) == bool(others_too)
    assert len(found[0]) == len(found[1]) == 39
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def keep(logits: torch.Tensor, *where: list) -> torch.Tensor:
    for each in where:
        each.append(logits[0])
    return logits


def test_threads_change_nothing(model, prefixes):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with Engine(model, []) as engine:
                found.append(logits_of(engine, requests([None, *prefixes])[:3]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_norms_and_gates_of_other_numbers_stay_the_plain_ones(model):
    """Whatever computes with the model in another dtype."""
    step_program(model)
    layer = model.base_model.layers[0]
    x = torch.randn(2, layer.mlp.gate_up_proj.in_features)
    for part in (layer.input_layernorm, layer.mlp):
        plain = type(part).__mro__[2]
        assert plain.__module__.startswith("transformers") and torch.equal(part(x), plain.forward(part, x))


def test_which_models_have_one(tmp_path):
    assert step_program(packed(4, "float32")) is None
    assert step_program(packed(4, kernels="exact")) is None
    assert step_program(load_base(BASE, dtype="bfloat16", device="cpu")) is None
    assert step_program(packed(8, folder=REPO / "models" / "baichuan-tiny")) is None  # another layer
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    for head_dim in (16, 32):  # half of which the rotary turns: it takes 16 at a time
        config = GlmConfig(**sizes, head_dim=head_dim, num_key_value_heads=2, attention_bias=True, pad_token_id=0)
        GlmForCausalLM(config).save_pretrained(tmp_path / str(head_dim))
        model = packed(4, folder=tmp_path / str(head_dim))
        program = step_program(model)
        assert (program is None) == (head_dim == 16)
        assert step_program(model) is program  # the same one for the next engine
