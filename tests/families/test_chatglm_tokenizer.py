"""The tokenizer apart from the golden ids: control tokens, padding, decoding, saving, chat messages."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from ptuning.errors import DataError
from ptuning.families.chatglm2.template import build_prompt
from ptuning.families.chatglm2.tokenizer import CONTROL_TOKENS, ChatGLMTokenizer
from ptuning.families.template import Dialogue, dialogue_of

SPELLED = ["[gMASK]", "sop", "</s>", "<unk>", "<s>", "[MASK]", "[sMASK]", "eop", "a [gMASK] sop b</s>", "<0x0A>"]
HISTORY = [("你好", "你好！"), ("sop", "[gMASK]</s>")]
DIALOGUE = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "sop"},
    {"role": "assistant", "content": "[gMASK]</s>"},
    {"role": "user", "content": "再见"},
]


def random_text(rng: random.Random) -> str:
    alphabet = [
        "你好",
        "世",
        "衣服",
        "答：",
        "，",
        "！",
        "abc",
        "Z",
        "01",
        "\n",
        "\t",
        "😀",
        "𠮷",
        "é",
        " ",
        "  ",
        *SPELLED,
    ]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(20)))


def test_control_ids_follow_the_last_piece(tiny_tokenizer):
    n = tiny_tokenizer.sp_model.get_piece_size()
    assert tiny_tokenizer.control_ids == {token: n + i for i, token in enumerate(CONTROL_TOKENS)}
    assert len(tiny_tokenizer) == tiny_tokenizer.vocab_size == n + 5
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.unk_token_id, tiny_tokenizer.bos_token_id) == (0, 0, 1)
    assert tiny_tokenizer.eos_token_id == 2
    assert tiny_tokenizer("你好").input_ids[:2] == tiny_tokenizer.prefix_ids() == [n + 1, n + 3]
    for token, index in tiny_tokenizer.control_ids.items():
        assert tiny_tokenizer.convert_tokens_to_ids(token) == index


@pytest.mark.parametrize("text", SPELLED)
def test_text_that_spells_a_control_token_stays_text(tiny_tokenizer, text):
    control = {0, 1, 2, *tiny_tokenizer.control_ids.values()}
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert ids == tiny_tokenizer.sp_model.encode(text)
    assert not set(ids) & control
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer([text, "x"], add_special_tokens=False).input_ids[0] == ids
    assert tiny_tokenizer.encode(text) == tiny_tokenizer.prefix_ids() + ids


@pytest.mark.parametrize(("text", "piece"), [("sop", "▁sop"), ("你sop", "sop")])
def test_sop_as_an_ordinary_piece_of_the_vocabulary(tiny_tokenizer, text, piece):
    index = tiny_tokenizer.sp_model.piece_to_id(piece)
    assert index != tiny_tokenizer.unk_token_id, "the fixture's corpus should make this a piece"
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert ids[-1] == index
    assert tiny_tokenizer(text).input_ids == [*tiny_tokenizer.prefix_ids(), *ids]
    assert tiny_tokenizer.decode([*tiny_tokenizer.prefix_ids(), *ids, 2]) == text


def test_random_texts_come_back(tiny_tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)]
    batch = tiny_tokenizer.encode_text(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert tiny_tokenizer.encode_text(text) == ids == tiny_tokenizer(text, add_special_tokens=False).input_ids
        assert max(ids, default=3) < tiny_tokenizer.sp_model.get_piece_size()
        assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text


def test_decoding_leaves_no_control_tokens(tiny_tokenizer):
    n = tiny_tokenizer.sp_model.get_piece_size()
    ids = tiny_tokenizer.encode_text("你好")
    noisy = [0, 0, *tiny_tokenizer.prefix_ids(), *ids, 2, n, n + 4, n + 5, n + 200, 0]
    for skip in (True, False):
        assert tiny_tokenizer.decode(noisy, skip_special_tokens=skip) == "你好"
        assert tiny_tokenizer.decode(torch.tensor(noisy), skip_special_tokens=skip) == "你好"
        assert tiny_tokenizer.batch_decode([noisy, [2]], skip_special_tokens=skip) == ["你好", ""]
    assert [tiny_tokenizer.decode(i) for i in (0, 1, 2, n, n + 4, n + 5, n + 1000)] == [""] * 7


def test_left_padding_with_position_ids(tiny_tokenizer):
    texts = ["你好", "这件外套简约而不简单，白色的衣身十分百搭。"]
    batch = tiny_tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}
    alone = [tiny_tokenizer(text).input_ids for text in texts]
    width = max(map(len, alone))
    for row, ids in enumerate(alone):
        pad = width - len(ids)
        assert batch["input_ids"][row].tolist() == [0] * pad + ids
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * len(ids)
        assert batch["position_ids"][row].tolist() == [0] * pad + list(range(len(ids)))
    assert tiny_tokenizer("你好", padding="max_length", max_length=9).input_ids == [0] * (9 - len(alone[0])) + alone[0]


def test_right_padding_where_asked_for(tiny_tokenizer):
    tokenizer = ChatGLMTokenizer(tiny_tokenizer.vocab_file, padding_side="right")
    batch = tokenizer(["你好", "你好 你好"], padding=True)
    pad = len(batch["input_ids"][1]) - len(tokenizer("你好").input_ids)
    assert pad > 0
    assert batch["input_ids"][0] == tokenizer("你好").input_ids + [0] * pad
    assert batch["position_ids"][0][-pad:] == [0] * pad


def test_pairs_and_special_tokens_mask(tiny_tokenizer):
    a, b = tiny_tokenizer.encode_text(["你好", "再见"])
    assert tiny_tokenizer("你好", "再见").input_ids == [*tiny_tokenizer.prefix_ids(), *a, *b, 2]
    out = tiny_tokenizer("你好", return_special_tokens_mask=True)
    assert out["special_tokens_mask"] == [1, 1] + [0] * len(a)
    assert tiny_tokenizer.get_special_tokens_mask([0, *out.input_ids, 2], already_has_special_tokens=True) == [
        1,
        1,
        1,
        *[0] * len(a),
        1,
    ]


def test_save_and_load(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    written = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written == {
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "chatglm"}', encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "saved")  # onto itself
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is ChatGLMTokenizer and again.padding_side == "left"
    for text in [*SPELLED, "你好"]:
        assert again(text).input_ids == tiny_tokenizer(text).input_ids


def test_build_prompt(tiny_tokenizer):
    expected = "[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：sop\n\n答：[gMASK]</s>\n\n[Round 3]\n\n问：再见\n\n答："
    assert build_prompt("再见", HISTORY) == tiny_tokenizer.build_prompt("再见", HISTORY) == expected
    assert tiny_tokenizer.build_prompt("再见") == "[Round 1]\n\n问：再见\n\n答："
    assert build_prompt("再见", HISTORY, system="短答") == "短答\n\n" + expected


def test_messages_give_the_ids_of_the_history_form(tiny_tokenizer):
    ids = tiny_tokenizer(build_prompt("再见", HISTORY)).input_ids
    assert tiny_tokenizer.apply_chat_template(DIALOGUE) == ids
    assert tiny_tokenizer.apply_chat_template(DIALOGUE, tokenize=False) == build_prompt("再见", HISTORY)
    system = [{"role": "system", "content": "短答"}, *DIALOGUE]
    assert tiny_tokenizer.apply_chat_template(system) == tiny_tokenizer(build_prompt("再见", HISTORY, "短答")).input_ids


def test_messages_that_end_with_an_answer(tiny_tokenizer):
    closed = [*DIALOGUE, {"role": "assistant", "content": "下次见"}]
    expected = tiny_tokenizer(build_prompt("再见", HISTORY)).input_ids + tiny_tokenizer.encode_text("下次见") + [2]
    assert tiny_tokenizer.apply_chat_template(closed) == expected
    assert tiny_tokenizer.apply_chat_template(closed, tokenize=False) == build_prompt("再见", HISTORY) + "下次见"


def test_messages_in_a_batch(tiny_tokenizer):
    short = [{"role": "user", "content": "你好"}]
    rows = [tiny_tokenizer.apply_chat_template(messages) for messages in (short, DIALOGUE)]
    assert tiny_tokenizer.apply_chat_template([short, DIALOGUE]) == rows
    padded = tiny_tokenizer.apply_chat_template([short, DIALOGUE], padding=True, return_tensors="pt", return_dict=True)
    reference = tiny_tokenizer([build_prompt("你好"), build_prompt("再见", HISTORY)], padding=True, return_tensors="pt")
    assert set(padded) == set(reference)
    for key, tensor in reference.items():
        assert torch.equal(padded[key], tensor), key
    alone = tiny_tokenizer.apply_chat_template([short, DIALOGUE], padding=True, return_tensors="pt")
    assert torch.equal(alone, reference["input_ids"])


def test_one_dialogue_as_a_tensor_or_dict(tiny_tokenizer):
    ids = tiny_tokenizer.apply_chat_template(DIALOGUE)
    assert tiny_tokenizer.apply_chat_template(DIALOGUE, return_tensors="pt").tolist() == [ids]
    single = tiny_tokenizer.apply_chat_template(DIALOGUE, return_dict=True)
    assert single["input_ids"] == ids
    assert single["attention_mask"] == [1] * len(ids)
    assert single["position_ids"] == list(range(len(ids)))
    tensors = tiny_tokenizer.apply_chat_template(DIALOGUE, return_dict=True, return_tensors="pt")
    assert tensors["position_ids"].tolist() == [list(range(len(ids)))]


def test_truncation_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="truncation would cut off"):
        tiny_tokenizer.apply_chat_template(DIALOGUE, truncation=True, max_length=8)


def test_messages_as_a_dialogue():
    assert dialogue_of(DIALOGUE) == Dialogue("再见", tuple(HISTORY))
    system = {"role": "system", "content": "短答"}
    assert dialogue_of([system, *DIALOGUE[:4]]) == Dialogue("sop", tuple(HISTORY[:1]), "短答", response="[gMASK]</s>")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: no user message"),
        ([{"role": "system", "content": "x"}], "messages: no user message"),
        ([{"role": "assistant", "content": "x"}], "messages[0]: role is 'assistant', expected 'user'"),
        ([DIALOGUE[0], DIALOGUE[0]], "messages[1]: role is 'user', expected 'assistant'"),
        ([DIALOGUE[0], {"role": "system", "content": "x"}], "messages[1]: role is 'system', expected 'assistant'"),
        ([DIALOGUE[0], {"role": "tool", "content": "x"}], "messages[1]: role is 'tool', expected 'assistant'"),
        ([{"content": "x"}], "messages[0]: role is None, expected 'user'"),
        ([{"role": "user", "content": None}], "messages[0]: content is NoneType, expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0]: content is list, expected text"),
    ],
)
def test_messages_that_are_no_dialogue_are_refused(messages, words):
    with pytest.raises(DataError) as caught:
        dialogue_of(messages)
    assert words in str(caught.value)
