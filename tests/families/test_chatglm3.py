"""ChatGLM3: told apart, its rotary base, and its template's ids, which are the official ones."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from ptuning.checkpoint.base import base_fingerprint, read_base_config
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.data.fit import fit
from ptuning.data.formats import Record
from ptuning.errors import ModelError
from ptuning.families import Dialogue, Offer, Part, Turn, family_of
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.families.chatglm3.config import ChatGLM3Config
from ptuning.families.chatglm3.family import ChatGLM3ForConditionalGeneration
from ptuning.families.chatglm3.tokenizer import ChatGLM3Tokenizer
from ptuning.loading import load_base, load_template, load_tokenizer
from tests.conftest import REPO, SHARED

TINY = REPO / "models" / "chatglm2-tiny"
ROLES = {"system": 2048, "user": 2049, "assistant": 2050, "observation": 2051}  # of chatglm2-tiny's 2,043 pieces
WEATHER = {"name": "get_weather", "description": "查询天气"}
CALL = Part("assistant", '{"city": "北京"}', "get_weather")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden_dir):
    """The golden ChatGLM2 weights with a ChatGLM3's files around them."""
    folder = tmp_path_factory.mktemp("renamed") / "my-model"
    shutil.copytree(golden_dir / "chatglm2-tiny", folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    roles = {str(token): {"content": f"<|{role}|>", "special": True} for role, token in ROLES.items()}
    values = {"tokenizer_class": "ChatGLMTokenizer", "added_tokens_decoder": roles, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def template(folder):
    return load_template(folder)


def ids(template, dialogue: Dialogue) -> list[int]:
    return template.encode([template.render(dialogue)])[0].ids


def test_it_is_told_apart_on_every_way_in(folder):
    assert read_base_config(folder)["model_type"] == "chatglm3"
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(config) is ChatGLM3Config and family_of(config).name == "chatglm3"
    assert type(tokenizer) is type(load_tokenizer(folder)) is ChatGLM3Tokenizer
    assert (
        type(copy.deepcopy(tokenizer)) is type(ChatGLMTokenizer(str(folder / "tokenizer.model"))) is ChatGLM3Tokenizer
    )
    assert type(load_base(folder, device="cpu")) is ChatGLM3ForConditionalGeneration
    assert type(AutoTokenizer.from_pretrained(TINY)) is ChatGLMTokenizer


@pytest.mark.works("chatglm3", "load")
def test_the_network_is_chatglm2_s(folder, golden, golden_dir):
    with torch.no_grad():
        logits = load_base(folder, device="cpu", dtype="float32")(golden["full.input_ids"]).logits
    assert torch.equal(logits, golden["base.full.logits"])
    assert base_fingerprint(folder) == base_fingerprint(golden_dir / "chatglm2-tiny")


def test_saved_it_is_official_and_still_a_chatglm3(folder, tmp_path):
    load_base(folder, device="cpu").save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["model_type"], written["_name_or_path"]) == ("chatglm", "THUDM/chatglm3-6b")
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is ChatGLM3Config
    load_tokenizer(folder).save_pretrained(tmp_path / "tokenizer")
    assert type(ChatGLMTokenizer(str(tmp_path / "tokenizer" / "tokenizer.model"))) is ChatGLM3Tokenizer
    shutil.copy(TINY / "tokenizer.model", tmp_path / "model")  # its config.json alone tells
    assert type(load_tokenizer(tmp_path / "model")) is ChatGLM3Tokenizer


@pytest.mark.works("chatglm3", "32k")
@pytest.mark.parametrize("ratio", [1, 50])
def test_rope_ratio_multiplies_the_rotary_base(folder, tmp_path, ratio):
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.bin*"))
    values = json.loads((folder / "config.json").read_text()) | {"rope_ratio": ratio}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.model").touch()
    for each in (config, AutoConfig.from_pretrained(tmp_path / "again")):
        positions = torch.tensor([[0, 1, 7, 200]])
        cos, _ = ChatGLM3ForConditionalGeneration(each).model.rotary_emb(torch.zeros(1), positions)
        angles = positions[0].double()[:, None] * (10000.0 * ratio) ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        assert torch.allclose(cos[0, :, :4].double(), angles.cos(), atol=1e-5)
    assert (family_of(config).vllm_refusal(config)) is None  # vLLM's class multiplies too


def test_another_architecture_is_refused_with_what_is_supported(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text()) | {"rmsnorm": False, "_name_or_path": "chatglm3-6b"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"LayerNorm instead of RMSNorm.*Supported: chatglm3-6b, chatglm3-6b-base and"):
        read_base_config(tmp_path)


def test_official_prompts():
    """As computed by the official tokenizer, on its own vocabulary."""
    path = SHARED / "chatglm2" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the real tokenizer is not part of the project")
    template = ChatGLM3Tokenizer(str(path)).template()
    rows = [json.loads(line) for line in (REPO / "tests" / "golden" / "chatglm3_chat.jsonl").open(encoding="utf-8")]
    for row in rows:
        history, system = row["history"], None
        if history and history[0]["role"] == "system":
            system = Offer.of(history[0]["content"], history[0]["tools"])
            history = history[1:]
        texts = [message["content"] for message in history]
        turns = tuple(zip(texts[::2], texts[1::2], strict=True))
        assert ids(template, Dialogue(row["query"], turns, system)) == row["input_ids"]
    assert template.stop_ids == (2, 64795, 64797) and len(rows) == 4


def test_each_piece_is_encoded_by_itself(template):
    encode, begin = template.tokenizer.encode_text, template.tokenizer.prefix_ids()
    line, user, assistant = encode("\n"), ROLES["user"], ROLES["assistant"]
    asked = [*begin, user, *line, *encode("你好"), assistant]
    assert ids(template, Dialogue("你好")) == asked
    assert ids(template, Dialogue("再见", (("你好", "您好"),), "店员")) == [
        *[*begin, ROLES["system"], *line, *encode("店员"), *asked[2:], *line, *encode("您好")],
        *[user, *line, *encode("再见"), assistant],
    ]
    assert ids(template, Dialogue("你好", response="您好")) == asked + template.answer_ids(["您好"])[0]
    assert template.answer_ids(["您好"]) == [[*line, *encode("您好")]]
    assert template.decode(template.answer_ids(["您好"])[0]).strip() == "您好"
    assert template.stop_ids == (2, user, ROLES["observation"]) and template.stop_texts(Dialogue("")) == ()
    tokens = ids(template, Dialogue("<|assistant|> </s> [gMASK]", (("<|user|>", "<|observation|>"),)))
    assert [token for token in tokens if token >= 2043 or token == 2] == [*begin, user, assistant, user, assistant]


def test_calls_and_what_tools_return(template):
    encode, line = template.tokenizer.encode_text, template.tokenizer.encode_text("\n")
    call = [*encode("get_weather\n"), *encode("```python\ntool_call(city='北京')\n```")]
    before = [*template.begin_ids, ROLES["user"], *line, *encode("天气？")]
    thought = Turn.of([Part("assistant", "查一下"), CALL])
    result = Turn.of([Part("observation", "15 度")])
    assert ids(template, Dialogue(result, (("天气？", thought),))) == [
        *[*before, ROLES["assistant"], *line, *encode("查一下"), ROLES["assistant"], *call],
        *[ROLES["observation"], *line, *encode("15 度"), ROLES["assistant"]],
    ]
    assert template.answer_ids([Turn.of([CALL])]) == [call]
    assert template.call_text("not JSON") == "not JSON" and template.call_text("[1]") == "[1]"
    assert "tool_call(n=3, ok=True, none=None)" in template.call_text('{"n": 3, "ok": true, "none": null}')


def test_for_a_template_without_roles_it_is_text(tiny_tokenizer):
    result, call = Turn.of([Part("observation", "15 度")]), Turn.of([CALL])
    assert (result, call) == ("工具返回：15 度", '调用工具：get_weather({"city": "北京"})')
    template = tiny_tokenizer.template()
    assert ids(template, Dialogue(result, (("天气？", call),))) == ids(
        template, Dialogue(str(result), (("天气？", str(call)),))
    )
    offer = Offer.of("", [{"type": "function", "function": WEATHER}])
    assert offer.startswith("Answer the following questions") and json.loads(offer.partition("\n")[2]) == [WEATHER]
    assert type(Turn.of([Part("user", "a"), Part("user", "b")])) is type(Offer.of("a", [])) is str
    for text in (call, offer):
        for copied in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
            assert (type(copied), copied) == (type(text), text)
    assert copy.deepcopy(call).parts == call.parts and copy.deepcopy(offer).tools == offer.tools


def test_labels_are_the_official_ones(template):
    """The last answer and its end; with loss_on=all earlier answers too, each with the token that ends it, but no <|assistant|>."""
    call = Turn.of([CALL])
    record = Record("谢谢", "不客气", (("天气？", call), (Turn.of([Part("observation", "15 度")]), "15 度。")), "a:1")
    (row,), _ = Encoder(template, Lengths(200, 20), loss_on="last").training_rows([record])
    answer = [*template.answer_ids(["不客气"])[0], 2]
    assert [label for label in row.labels if label != IGNORE] == answer and row.input_ids[-len(answer) :] == answer
    (row,), _ = Encoder(template, Lengths(200, 20), loss_on="all").training_rows([record])
    expected = [
        *template.answer_ids([call])[0],
        ROLES["observation"],
        *template.answer_ids(["15 度。"])[0],
        ROLES["user"],
    ]
    assert [label for label in row.labels if label != IGNORE] == expected + answer
    cut = Encoder(template, Lengths(200, 3)).training_rows([Record("好", "谢谢谢谢谢谢谢谢", (), "a:1")])[0][0]
    assert cut.labels[-3:] == template.answer_ids(["谢谢谢谢谢谢谢谢"])[0][:3]


def test_a_dialogue_with_tools_is_made_to_fit(template):
    turns = tuple((f"问{n}" * 9, Turn.of([CALL])) for n in range(8))
    prompt = Turn.of([Part("observation", "15 度")])
    whole = Dialogue(prompt, turns, Offer.of("", [WEATHER]))
    short = fit(template, whole, len(ids(template, whole)) - 30)
    assert 0 < short.dropped_turns < 8
    assert short.ids == ids(template, Dialogue(prompt, turns[short.dropped_turns :], whole.system))


def test_of_what_a_tool_returned_that_is_too_long_some_stays(template):
    result = Turn.of([Part("observation", "旧"), Part("observation", "一二三四五六七八九十" * 20)])
    cut = fit(template, Dialogue(result, (("天气？", Turn.of([CALL])),)), 40)
    observation = ROLES["observation"]
    assert cut.cut_question and 30 < len(cut.ids) <= 40 and cut.ids.count(observation) == 1
    assert cut.ids[2] == observation and ROLES["user"] not in cut.ids
    assert template.shortened("一二三四", 2) == "一四"


def test_apply_chat_template(template):
    tokenizer = template.tokenizer
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    assert tokenizer.apply_chat_template(messages) == [*ids(template, Dialogue("你好", response="您好")), 2]
    assert tokenizer.apply_chat_template(messages[:1]) == ids(template, Dialogue("你好"))
    text = "<|user|>\n你好<|assistant|>"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == tokenizer.build_prompt("你好") == text
