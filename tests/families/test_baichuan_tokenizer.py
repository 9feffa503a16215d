"""Baichuan's tokenizer and template: who speaks is a token, and no text becomes one."""

import io
import shutil

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from ptuning.data.fit import FitPolicy, PromptTooLong, fit
from ptuning.errors import DataError, ModelError
from ptuning.families import Dialogue
from ptuning.families.baichuan.template import ASSISTANT, USER, BaichuanTemplate
from ptuning.families.baichuan.tokenizer import BaichuanTokenizer
from tests.conftest import REPO

BASE = REPO / "models" / "baichuan-tiny"
HISTORY = (("你好", "您好"), ("再见", "慢走"))


@pytest.fixture(scope="module")
def tokenizer() -> BaichuanTokenizer:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def first_version(tmp_path_factory) -> BaichuanTokenizer:
    """Baichuan-13B's names: the user is <reserved_102>."""
    model = io.BytesIO()
    symbols = [f"<unused_{i}>" for i in range(90)] + [f"<reserved_{i}>" for i in range(104)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["你好 您好 再见 慢走"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=470,
        user_defined_symbols=symbols,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("first") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return BaichuanTokenizer(str(path))


def ids(tokenizer, dialogue: Dialogue) -> list[int]:
    template = BaichuanTemplate(tokenizer)
    return template.encode([template.render(dialogue)])[0].ids


def test_no_begin_token_and_the_official_specials(tokenizer):
    found = tokenizer("你好，世界")
    assert tokenizer.sp_model.encode("你好，世界") == found.input_ids and "position_ids" not in found
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        0,
    )
    assert tokenizer.padding_side == "left" and len(tokenizer) == tokenizer.sp_model.get_piece_size() == 1024
    assert tokenizer.decode([*found.input_ids, USER, ASSISTANT, 2]) == "你好，世界"
    with_both = BaichuanTokenizer(tokenizer.vocab_file, add_bos_token=True, add_eos_token=True)
    assert with_both("你好").input_ids == [1, *tokenizer("你好").input_ids, 2]


def test_texts_come_back(tokenizer):
    for text in ("你好  world\n\t!", " leading", "𠮷野家", "<s></s><unk>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", ["<reserved_106>", "a<reserved_107>b", "</s>", "<unk><s>"])
def test_no_text_is_a_control_token(tokenizer, text):
    """In the official file the speakers' names are ordinary pieces."""
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    assert not {0, 1, 2, USER, ASSISTANT} & set(tokenizer(text).input_ids)
    assert {USER, ASSISTANT} & set(plain.encode(text)) or "reserved" not in text
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_template(tokenizer):
    encode = tokenizer.encode_text
    answered = [USER, *encode("你好"), ASSISTANT, *encode("您好"), USER, *encode("再见"), ASSISTANT, *encode("慢走")]
    open_turn = [USER, *encode("谢谢"), ASSISTANT]
    assert ids(tokenizer, Dialogue("谢谢")) == open_turn
    assert ids(tokenizer, Dialogue("谢谢", HISTORY, "你是店员")) == [*encode("你是店员"), *answered, *open_turn]
    assert ids(tokenizer, Dialogue("谢谢", response="不客气")) == [*open_turn, *encode("不客气")]
    assert ids(tokenizer, Dialogue("谢谢", source_prefix="注意：")) == [*encode("注意："), *open_turn]
    template = BaichuanTemplate(tokenizer)
    assert template.stop_ids == (2, USER) and template.end_id == 2 and template.stop_texts(Dialogue("谢谢")) == ()
    assert template.token_bytes(USER) == b"<reserved_106>"


def test_the_first_version_closes_earlier_answers(first_version):
    encode = first_version.encode_text
    expected = [USER, *encode("你好"), ASSISTANT, *encode("您好"), 2, USER, *encode("再见"), ASSISTANT]
    assert ids(first_version, Dialogue("再见", HISTORY[:1])) == expected
    text = first_version.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert text == "<reserved_102>你好<reserved_103>"


def test_apply_chat_template(tokenizer):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
    whole = tokenizer.apply_chat_template(messages)
    assert whole == [*ids(tokenizer, Dialogue("你好", response="您好")), 2]
    batch = tokenizer.apply_chat_template([messages, messages[:1]], padding=True, return_tensors="pt", return_dict=True)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == torch.Size([2, len(whole)])
    assert batch["input_ids"][1].tolist()[-3:][::2] == [tokenizer("你好").input_ids[-2], ASSISTANT]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<reserved_106>你好<reserved_107>您好"
    with pytest.raises(DataError, match="truncation would cut off where the answer begins"):
        tokenizer.apply_chat_template(messages, truncation=True)


def test_the_oldest_turns_go_first_then_the_question_is_cut_on_the_left(tokenizer):
    template = BaichuanTemplate(tokenizer)
    whole = Dialogue("谢谢", HISTORY)
    short = fit(template, whole, len(ids(tokenizer, whole)) - 1)
    assert short.dropped_turns == 1 and short.ids == ids(tokenizer, Dialogue("谢谢", HISTORY[1:]))
    question = "一二三四五六七八九十" * 20
    cut = fit(template, Dialogue(question), 30)
    assert cut.cut_question and len(cut.ids) <= 30
    assert cut.ids[0] == USER and question.endswith(tokenizer.decode(cut.ids))
    with pytest.raises(PromptTooLong):
        fit(template, Dialogue(question), 30, FitPolicy())


def test_another_model_s_tokenizer_is_refused(tmp_path):
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    shutil.copy(REPO / "models" / "chatglm2-tiny" / "tokenizer.model", tmp_path)
    with pytest.raises(
        ModelError, match=r"piece 195 is .* expected <reserved_102> or <reserved_106> .*another model's tokenizer"
    ):
        AutoTokenizer.from_pretrained(tmp_path)


def test_saved_as_official_files(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    assert (tmp_path / "tokenizer.model").read_bytes() == (BASE / "tokenizer.model").read_bytes()
    assert (tmp_path / "tokenizer_config.json").read_text() == (BASE / "tokenizer_config.json").read_text()
