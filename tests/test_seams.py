"""A family and a method that the package has never heard of go the whole way: train, save, resume, load, evaluate, serve.

Both are defined here and nowhere else. What it takes to add one is what stands in `Toy…` and `Biases`.
"""

import contextlib
import inspect
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from ptuning import load_model, methods
from ptuning.checkpoint.manifest import read_manifest
from ptuning.families import Dialogue, Family, Segment, Template, family, family_of
from ptuning.generation import Token
from ptuning.main import main
from ptuning.methods import FullMethod, MemoryTerms, add_method, attached, bare, registry
from ptuning.serving.app import create_app
from ptuning.serving.detokenize import AnswerText
from ptuning.serving.options import ServeOptions
from ptuning.serving.prompts import PromptBuilder
from ptuning.serving.server import build


class ToyTemplate(Template):
    """Question and answer between two control tokens; an answer ends with the next question's token, or with </s>."""

    name = "toy"
    user, assistant = 259, 260  # ByT5's first spare tokens
    begin_ids = (259,)
    end_id = 259
    stop_ids = (259, 1)

    def render(self, dialogue: Dialogue) -> list[Segment]:
        segments = []
        if dialogue.system:
            segments.append(Segment(dialogue.system, role="system", apart=True))
        turns = [*dialogue.history, (dialogue.source_prefix + dialogue.prompt, dialogue.response)]
        for question, answer in turns:
            segments += [Segment(ids=(self.user,)), Segment(question, role="user", apart=True)]
            segments.append(Segment(ids=(self.assistant,)))
            if answer is not None:
                segments.append(Segment(answer, role="assistant", is_answer=True, apart=True))
        return segments

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 3]) if 3 <= token < 259 else super().token_bytes(token)


class ToyFamily(Family):
    """Llama's network on bytes."""

    name = "toy"
    model_type = "llama"
    supported = "the toy"
    template_name = ToyTemplate.name
    tokenizer_files = ("tokenizer_config.json",)

    def register(self) -> None:
        pass  # transformers knows Llama

    def template(self, tokenizer) -> ToyTemplate:
        return ToyTemplate(tokenizer)


class Biases(FullMethod):
    """Trains the biases alone; what is saved is a whole model."""

    name = "biases"
    learning_rate = 3e-2

    def describe(self) -> str:
        return "biases"

    def start(self, model) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))

    def memory(self, base) -> MemoryTerms:
        return MemoryTerms(base.layers * (base.query + 2 * base.key + 3 * base.ffn + 2 * base.hidden), frozen_base=True)


@dataclass(frozen=True)
class Tuned:
    """A finished run."""

    name: str  # of the method
    base: Path
    folder: Path
    rows: Path
    options: list  # without the folder

    @property
    def given_as(self) -> list:
        """The options that name it to evaluate."""
        return ["--ptuning_checkpoint" if self.on_base else "--model_name_or_path", self.folder]

    @property
    def on_base(self) -> bool:
        return self.name != "biases"

    def load(self):
        return load_model(self.base, self.folder) if self.on_base else load_model(self.folder)


TYPES = {"prefix": methods.PrefixMethod, "lora": methods.LoraMethod, "lora+prefix": methods.LoraPrefixMethod}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for part in (".", "lora", "prefix") for file in (folder / part).glob("*.safetensors")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


ROWS = [{"q": "好", "a": "ok"}, {"q": "b", "a": "no"}, {"q": "好吗", "a": "ok"}, {"q": "bb", "a": "no"}]
STEPS = 60
LORA = ["--lora_rank", "4", "--learning_rate", "2e-2", "--lora_dropout", "0.1"]
METHODS = {
    "biases": [],
    "lora": LORA,
    "lora+prefix": [*LORA, "--pre_seq_len", "4", "--prefix_dropout", "0"],
    "prefix": ["--pre_seq_len", "8", "--learning_rate", "5e-2", "--prefix_dropout", "0"],
}


@pytest.mark.parametrize("toy", [(ToyTemplate, ToyFamily), (Biases,)], ids=["family", "method"])
def test_it_takes_under_60_lines(toy):
    assert sum(len(inspect.getsource(part).splitlines()) for part in toy) < 60


@pytest.fixture(scope="module", autouse=True)
def known():
    """The toys are known for as long as this module runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
        patch.setattr(registry, "_METHODS", dict(registry._METHODS))
        family.add_family(ToyFamily())
        add_method(Biases)
        yield


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory, known):
    """A base with random weights, as transformers saves one."""
    folder = tmp_path_factory.mktemp("toy-base")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    biases = {"attention_bias": True, "mlp_bias": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=384, num_hidden_layers=2, head_dim=16, **sizes, **biases))
    with torch.no_grad():
        for weight in model.parameters():  # larger than transformers' 0.02, as in a trained model
            weight.mul_(8 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=METHODS)
def tuned(request, toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    options = ["--model_name_or_path", toy_base, "--method", request.param, *METHODS[request.param]]
    options += ["--do_train", "--train_file", rows, "--prompt_column", "q", "--response_column", "a"]
    options += ["--per_device_train_batch_size", 4, "--max_steps", STEPS, "--save_steps", STEPS // 2]
    options += ["--max_source_length", 32, "--max_target_length", 8, "--report_to", "none", "--use_cpu", "true"]
    assert run(*options, "--output_dir", folder / "run") == 0
    return Tuned(request.param, toy_base, folder / "run", rows, options)


def run(*options) -> int:
    return main([str(option) for option in options])


def test_train_and_save(tuned):
    manifest = read_manifest(tuned.folder)
    assert (manifest.method, manifest.base.family, manifest.template) == (tuned.name, "toy", "toy")
    assert (manifest.max_source_length, manifest.max_target_length) == (32, 8)
    before, after = tensors_in(tuned.base), tensors_in(tuned.folder)
    if tuned.name == "biases":
        changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert set(after) == set(before) and changed == {key for key in before if key.endswith(".bias")}
    losses = [json.loads(line).get("loss") for line in (tuned.folder / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0], losses


def test_resume_is_exact(tuned, tmp_path):
    assert run(*tuned.options, "--output_dir", tmp_path / "run", "--save_steps", STEPS // 2) == 0
    (tmp_path / "run" / f"checkpoint-{STEPS}").rename(tmp_path / "gone")  # as if killed before it
    resumed = [*tuned.options, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true"]
    assert run(*resumed) == 0
    again, once = tensors_in(tmp_path / "run"), tensors_in(tuned.folder)
    assert again.keys() == once.keys() and all(torch.equal(again[key], once[key]) for key in once)


def test_load_and_stop_ids(tuned):
    model, tokenizer = tuned.load()
    template = family_of(model.config).template(tokenizer)
    assert type(template) is ToyTemplate and attached(model) == TYPES.get(tuned.name)
    ids = torch.tensor([template.encode([template.render(Dialogue("好"))])[0].ids])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": list(template.stop_ids), "pad_token_id": 0}
    answer = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert template.decode(answer) == "ok" and answer[-1] == template.user
    with bare(model):
        untuned = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert (untuned == answer) == (tuned.name == "biases")


@pytest.fixture
def ends_otherwise(monkeypatch):
    """What the tuned model says at the end is no longer the template's first choice, only one of its stop tokens."""
    monkeypatch.setattr(ToyTemplate, "end_id", 1)


def test_evaluate(tuned, tmp_path, ends_otherwise):
    options = ["--do_predict", "--test_file", tuned.rows, "--prompt_column", "q", "--response_column", "a"]
    options += ["--report_to", "none", "--use_cpu", "true", "--output_dir", tmp_path / "evaluated"]
    options += ["--max_target_length", 8, *tuned.given_as]
    assert run(*options) == 0
    scores = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["tuned"]
    assert scores["exact_match"] == 100 and scores["rows"] == len(ROWS), scores


@contextlib.contextmanager
def serving(options: ServeOptions) -> Iterator[str]:
    """The address of a server for as long as the block lasts."""
    worker, metrics = build(options)
    worker.start()
    server = uvicorn.Server(uvicorn.Config(create_app(worker, options, metrics), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        worker.close()
        thread.join(timeout=120)


def test_serve(tuned, ends_otherwise):
    options = ServeOptions(model=str(tuned.folder), prefix=())
    if tuned.on_base:
        options = ServeOptions(model=str(tuned.base), prefix=(("tuned", str(tuned.folder)),))
    with serving(options) as url:
        name = httpx.get(f"{url}/v1/models").json()["data"][-1]["id"]
        for row in ROWS:
            body = {"model": name, "messages": [{"role": "user", "content": row["q"]}], "temperature": 0}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 8}, timeout=300).json()
            (choice,) = answer["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (row["a"], "stop"), answer


def test_where_control_tokens_part_the_turns_no_text_ends_an_answer():
    template = ToyTemplate(ByT5Tokenizer())
    prompt = PromptBuilder(template, 256).chat(Dialogue("好", (("b", "no"),)))
    text, said = AnswerText(template, prompt.stops), "ok\n\n[Round 3]\n\n问：b"
    parts = [text.push(Token(0, token)).text for token in template.encode_text([said])[0]]
    assert prompt.stops == () and "".join(parts) == said
