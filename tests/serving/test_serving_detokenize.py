"""Text of a growing answer: whole characters, no part of a stop string, equal to decoding everything at once."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.generation import Token
from ptuning.serving.detokenize import AnswerText, Detokenizer, StopStrings


def pieces(tokenizer, ids, stops=(), strip=False, finish="stop"):
    text = AnswerText(ChatGLM2Template(tokenizer), stops, strip)
    made = []
    for token in ids:
        made.append(text.push(Token(0, token)))
        if made[-1].finish:
            return made
    made.append(text.push(Token(0, None, finish)))
    return made


def joined(made):
    return "".join(piece.text for piece in made)


@pytest.mark.parametrize("which", ["tiny_tokenizer", "real_tokenizer"])
def test_any_tokens_give_the_text_of_decoding_them_at_once(which, request):
    tokenizer = request.getfixturevalue(which)
    size, chance = tokenizer.sp_model.get_piece_size(), random.Random(0)
    for _ in range(300):
        # Byte pieces come first in the vocabulary: half of these texts are full of broken characters.
        ids = [chance.randrange(260 if chance.random() < 0.5 else size) for _ in range(chance.randrange(1, 30))]
        made = pieces(tokenizer, ids)
        assert joined(made) == tokenizer.decode(ids).rstrip("\ufffd")


def test_texts_come_back_as_they_are(tiny_tokenizer):
    for text in ("你好，世界！😀 emoji 🇨🇳 and  spaces\n\n\ttabs", "𠀀𠀁", " leading", "a b c", "e\u0301"):
        ids = tiny_tokenizer.encode_text(text)
        made = pieces(tiny_tokenizer, ids)
        assert joined(made) == text
        assert not any("\ufffd" in piece.text for piece in made)


def test_an_emoji_is_never_split(tiny_tokenizer):
    ids = tiny_tokenizer.encode_text("😀")
    assert len(ids) >= 4
    made = pieces(tiny_tokenizer, ids)
    assert [piece.text for piece in made if piece.text] == ["😀"]
    cut = pieces(tiny_tokenizer, ids[:-1], finish="length")
    assert joined(cut) == ""


def test_control_tokens_have_no_text(tiny_tokenizer):
    control = list(tiny_tokenizer.control_ids.values())
    ids = [*control, *tiny_tokenizer.encode_text("好 的"), 2, 1, 0, 10**4, *tiny_tokenizer.encode_text("好")]
    assert joined(pieces(tiny_tokenizer, ids)) == tiny_tokenizer.decode(ids)


def test_decoding_does_not_grow_with_the_answer(tiny_tokenizer):
    text = Detokenizer(ChatGLM2Template(tiny_tokenizer))
    for token in tiny_tokenizer.encode_text("你好 " * 200):
        text.push(token)
        assert len(text.ids) - text.context <= 12


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings(parts, stops):
    finder, out = StopStrings(stops), ""
    for part in parts:
        out += finder.push(part)
        assert not any(stop in out for stop in stops)
        if finder.stopped:
            break
    else:
        out += finder.finish()
    whole = "".join(parts)
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    if not ends:
        assert out == whole
    else:
        # The stop string that is complete first ends the answer; nothing of it was shown.
        assert whole.startswith(out) and any(whole.startswith(stop, len(out)) for stop in stops)


@pytest.mark.parametrize("strip", [False, True])
def test_stop_strings_over_tokens(tiny_tokenizer, strip):
    ids = tiny_tokenizer.encode_text("猫狗鸟鱼马")  # not in the vocabulary: three byte tokens a character
    made = pieces(tiny_tokenizer, ids, ["鸟鱼"], strip)
    assert joined(made) == "猫狗"
    assert made[-1].finish == "stop"
    shown = [token.token for piece in made for token in piece.tokens]
    assert tiny_tokenizer.decode(shown) == "猫狗"


def test_a_beginning_of_a_stop_string_comes_out_at_the_end(tiny_tokenizer):
    made = pieces(tiny_tokenizer, tiny_tokenizer.encode_text("白色的"), ["色的衣"])
    assert joined(made) == "白色的"
    assert sum(len(piece.tokens) for piece in made) == len(tiny_tokenizer.encode_text("白色的"))


def test_blanks_around_an_answer_go_as_in_evaluation(tiny_tokenizer):
    text = " \n 你好  世界\n\n 好 \n "
    made = pieces(tiny_tokenizer, tiny_tokenizer.encode_text(text), strip=True)
    assert joined(made) == text.strip()


def test_starts_are_places_in_the_text(tiny_tokenizer):
    ids = tiny_tokenizer.encode_text("你好，世界 the quick")
    made = pieces(tiny_tokenizer, ids)
    starts = [start for piece in made for start in piece.starts]
    assert starts[0] == 0 and starts == sorted(starts) and len(starts) == len(ids)
    assert starts[-1] < len(joined(made))
