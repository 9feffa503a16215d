"""GLM-130B's configuration, positions and mask from ids, tokenizer and template."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ptuning.errors import GenerationError, ModelError
from ptuning.families import Dialogue, family_of
from ptuning.families.glm130b.config import TOKENS as REAL
from ptuning.families.glm130b.config import GLM130BConfig
from ptuning.families.glm130b.context import blank_positions, context_lengths, open_context
from ptuning.families.glm130b.model import GLM130BForCausalLM
from ptuning.families.glm130b.tokenizer import FILE, GLM130BTokenizer
from ptuning.generation import Engine
from tests.tiny_glm130b import TOKENS, make_folder, pieces

MASK, GMASK, EOS, SOP = (TOKENS[name] for name in ("[MASK]", "[gMASK]", "eos", "sop"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("glm130b") / "base")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_auto_classes_read_the_folder(folder):
    assert type(AutoConfig.from_pretrained(folder)) is GLM130BConfig
    for auto in (AutoModelForCausalLM, AutoModel):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert type(model) is GLM130BForCausalLM and not any(info.values())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_official_names_are_written_back(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path))
    assert (
        after == before | {"transformers_version": after.get("transformers_version")}
        and after["inner_hidden_size"] == 96
        and "num_hidden_layers" not in after
    )


def test_the_defaults_are_the_130b_models():
    config = GLM130BConfig()
    with torch.device("meta"):
        model = GLM130BForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 128_697_794_560
    assert family_of(config).dimensions(config).head_dim == 128
    assert config.tokens == REAL and config.eos_token_id == [150005, 20002]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"num_layers": 0}, "num_layers is 0 in config.json and must be a whole number of at least 1"),
        ({"hidden_size": 65}, "hidden_size is 65 and num_attention_heads 4; a head must have a whole, even number"),
        (
            {"tokens": {"sop": 1}},
            "tokens must map [MASK], [gMASK], sop, eos to their ids; missing: [MASK], [gMASK], eos",
        ),
        ({"vocab_size": 317}, "tokens gives sop the id 317; it must be from 0 to 316 (vocab_size - 1)"),
    ],
)
def test_other_numbers_are_refused(folder, tmp_path, values, text):
    config = json.loads((folder / "config.json").read_text()) | values
    for refusing in (lambda: family_of(config).check(config, tmp_path), lambda: GLM130BConfig(**config)):
        with pytest.raises(ModelError) as caught:
            refusing()
        assert text in str(caught.value)


def test_positions():
    """Of a row without sop, with [gMASK], with [MASK] behind another blank, and padded on the left."""
    ids = torch.tensor(
        [[1, 2, 3, 4, 5, 6], [1, 2, GMASK, SOP, 5, 6], [GMASK, 2, MASK, 4, SOP, MASK], [0, 0, MASK, 2, SOP, 5]]
    )
    mask = torch.ones_like(ids)
    mask[3, :2] = 0
    assert context_lengths(ids, TOKENS).tolist() == [0, 3, 4, 4]
    found = blank_positions(ids, mask, TOKENS)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 2, 2], [0, 0, 0, 1, 0, 0]]


def test_every_query_sees_the_whole_context_and_no_padding():
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    causal[1, :, :, 0] = False  # padding
    seen = open_context(causal, torch.tensor([3, 3]))[:, 0].long()
    assert seen[0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen[1].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


@torch.no_grad()
def test_a_later_context_token_changes_an_earlier_one(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    one, other = torch.tensor([[5, 6, 7, GMASK, SOP]]), torch.tensor([[5, 6, 8, GMASK, SOP]])
    assert not torch.allclose(model(one).logits[:, 0], model(other).logits[:, 0])
    assert torch.equal(model(one[:, :3]).logits[:, 0], model(other[:, :3]).logits[:, 0])  # no sop: left to right


def test_texts_and_blanks(tokenizer):
    for text in ("the capital\nof\tFrance", "a  b   c", "你好 [MASK] sop"):
        ids = tokenizer.encode_text(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(TOKENS.values())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_text("a\n\t"))[-2:] == ["<n>", "<|tab|>"]
    assert tokenizer.eos_token_id == 2 and len(tokenizer) == 318


def test_what_icetk_adds_is_added_where_the_file_lacks_it(tmp_path):
    """Behind N pieces: eight control tokens, tab, 2 to 80 blanks, 256 bytes; all ids moved by the image tokens."""
    (tmp_path / FILE).write_bytes(pieces(size=60))
    bare = GLM130BTokenizer(str(tmp_path / FILE), num_image_tokens=20000)
    count = bare.sp_model.get_piece_size() - 20000 - (8 + 1 + 79 + 256)
    first = 20000 + count
    assert [bare.sp_model.id_to_piece(first + i) for i in (0, 4, 5, 8, 9, 87, 88)] == [
        *("[MASK]", "<sop>", "<eop>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<0x00>")
    ]
    text = "Paris" + " " * 80 + "\tß [MASK]"
    ids = bare.encode_text(text)
    assert first + 87 in ids and first + 8 in ids and {first + 88 + 0xC3, first + 88 + 0x9F} <= set(ids)
    assert first not in ids and min(ids) >= 20000 and bare.decode(ids) == text
    assert (bare.unk_token_id, bare.eos_token_id) == (20000, 20002)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(pieces("<|tab|>"))
    with pytest.raises(
        ModelError, match=r"id 100 is the piece '.*', and config.json says that it is sop; the two belong to"
    ):
        GLM130BTokenizer(str(tmp_path / FILE), num_image_tokens=0, tokens=TOKENS | {"sop": 100})


def test_the_template_asks_behind_the_text(tokenizer):
    template = family_of({"model_type": "glm130b"}).template(tokenizer)
    encoded = template.encode([template.render(Dialogue("the capital", (("a", "b"),), "you", response="Paris"))])[0]
    at = encoded.ids.index(SOP)
    assert encoded.ids[at - 1] == GMASK and tokenizer.decode(encoded.ids[:at]) == "you\na\nb\nthe capital"
    assert tokenizer.decode(encoded.ids[at:]) == "Paris" and template.end_id == EOS  # this vocabulary has no eop
    assert GLM130BTokenizer.template(tokenizer).stop_ids == (EOS,)


def test_the_engine_refuses(folder):
    with pytest.raises(GenerationError, match=r"context is read both ways.*`ptuning fill` writes on and fills blanks"):
        Engine(AutoModelForCausalLM.from_pretrained(folder), [EOS])
