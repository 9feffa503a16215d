"""A prefix and a LoRA on the golden GLM-130B: trained, saved, loaded, and what they were taught is what they write."""

import json

import pytest
import torch

from ptuning import load_model
from ptuning.cli import main
from ptuning.families import Dialogue, family_of
from ptuning.main import main as run
from ptuning.methods import bare
from ptuning.methods.prefix.attach import attach_prefix
from tests.tiny_glm130b import make_folder

ROWS = [{"q": "the capital", "a": "Paris"}, {"q": "你好", "a": "世界"}]
OPTIONS = {
    "prefix": ["--pre_seq_len", 4, "--prefix_dropout", 0, "--learning_rate", "5e-2"],
    "lora": ["--lora_rank", 4, "--lora_dropout", 0, "--learning_rate", "1e-2"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("glm130b") / "base")


@pytest.fixture(scope="module", params=OPTIONS)
def tuned(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    options = ["--model_name_or_path", base, "--method", request.param, *OPTIONS[request.param], "--do_train"]
    options += ["--train_file", rows, "--prompt_column", "q", "--response_column", "a", "--output_dir", folder / "run"]
    options += ["--per_device_train_batch_size", 2, "--max_steps", 60, "--save_steps", 60, "--max_source_length", 24]
    options += ["--max_target_length", 16, "--report_to", "none", "--use_cpu", "true", "--logging_steps", 10]
    assert run([str(option) for option in options]) == 0
    return folder / "run"


@pytest.mark.works("glm130b", "prefix", "LoRA")
def test_the_answers_are_learned(tuned, base, capsys):
    losses = [json.loads(line).get("loss") for line in (tuned / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.2 * losses[0], losses
    texts = [part for row in ROWS for part in ("--text", row["q"])]
    assert main(["fill", "--ptuning_checkpoint", str(tuned), "--max_new_tokens", "12", *texts]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["the capital Paris", "你好 世界"]


@torch.no_grad()
def test_taken_off_it_is_the_base(tuned, base):
    model, tokenizer = load_model(base, tuned)
    template = family_of(model.config).template(tokenizer)
    ids = torch.tensor([template.encode([template.render(Dialogue("the capital"))])[0].ids])
    untuned = load_model(base)[0](ids).logits
    assert not torch.allclose(model(ids).logits, untuned, atol=1.0)
    with bare(model):
        assert torch.equal(model(ids).logits, untuned)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_is_seen_before_everything(base, attention):
    """A key of zeros takes its share of every softmax, with a cache as without."""
    model = load_model(base, attn_implementation=attention)[0]
    encoder = attach_prefix(model, 1)
    with torch.no_grad():
        encoder.embedding.weight.zero_()
    ids = torch.tensor([[5, 6, 7, 315, 317]])
    seen = model(ids).logits
    with bare(model):
        assert not torch.allclose(seen, model(ids).logits)
    again = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    step = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False)
    assert again.tolist() == step.tolist()
