"""`ptuning fill`: blanks are filled one after the other as the official script does, and a text is written on."""

import pytest
import torch
from safetensors.torch import load_file

from ptuning import load_model
from ptuning.cli import main
from ptuning.families import family_of
from ptuning.generation.fill import fill
from tests.conftest import REPO
from tests.tiny_glm130b import GOLDEN, TOKENS, make_folder

MASK, GMASK, EOS, SOP = (TOKENS[name] for name in ("[MASK]", "[gMASK]", "eos", "sop"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("glm130b") / "base")


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load_model(folder)
    return model, family_of(model.config).template(tokenizer)


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """Token by token, each from the whole row, without a cache."""
    new: list[int] = []
    while len(new) < count:
        logits = model(torch.tensor([[*ids, SOP, *new]])).logits[0, -1]
        logits[[MASK, GMASK, SOP]] = -torch.inf
        new.append(int(logits.argmax()))
        if new[-1] == EOS:
            return new[:-1]
    return new


def test_blanks_in_turn(loaded):
    model, template = loaded
    a, b, c = template.encode_text(["the ", " of ", " is"])
    first = greedy(model, [*a, MASK, *b, MASK, *c, EOS], 4)
    second = greedy(model, [*a, *first, *b, MASK, *c, EOS], 4)
    assert first != second
    expected = template.decode([*a, *first, *b, *second, *c])
    assert fill(model, template, "the [MASK] of [MASK] is", max_new_tokens=4) == expected


@pytest.mark.parametrize("text", ["the capital", "the capital[gMASK]"])
def test_writing_on(loaded, text):
    model, template = loaded
    (ids,) = template.encode_text(["the capital"])
    written = greedy(model, [*ids, GMASK], 6)
    assert fill(model, template, text, max_new_tokens=6) == template.decode([*ids, *written])


def test_the_golden_answer(loaded):
    """The context of the official figures, by ids that are texts of no tokenizer."""
    model, _ = loaded
    expected = load_file(GOLDEN / "expected.safetensors")
    ids = expected["gmask.input_ids"][0, :12].tolist()
    assert greedy(model, ids, 10) == expected["gmask.greedy"].tolist()


def test_the_command(folder, capsys):
    command = ["fill", "--model", str(folder), "--max_new_tokens", "3", "--text", "the [MASK] is"]
    assert main([*command, "--text", "你好"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("the") and second.startswith("你好") and "MASK" not in first + second
    assert main([*command, "--temperature", "0.9", "--seed", "5"]) == 0
    sampled = capsys.readouterr().out
    assert main([*command, "--temperature", "0.9", "--seed", "5"]) == 0
    assert capsys.readouterr().out == sampled


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; use at least 1"),
        (["--top_p", "0.5"], "--top_p is for sampling: give a --temperature above 0, or leave it out"),
        (["--temperature", "-1"], "--temperature is -1.0 and --top_p 1.0; use 0 or more, and above 0 up to 1"),
        (
            ["--text", "the " * 90],
            "tokens with its blanks, and the model reads 64 with what it writes; shorten the text",
        ),
        (["--model", str(REPO / "models" / "chatglm2-tiny")], "fills no blanks; use ptuning chat or predict"),
    ],
)
def test_what_cannot_be_filled(options, text, folder, capsys):
    assert main(["fill", "--model", str(folder), "--text", "the", "--max_new_tokens", "2", *options]) == 2
    assert text in capsys.readouterr().err
