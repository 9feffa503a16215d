"""A folder of a GLM-4's original format: a tiktoken vocabulary learned here, and two layers of random weights."""

import base64
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ptuning.families.chatglm4.config import ChatGLM4Config
from ptuning.families.chatglm4.family import ChatGLM4ForConditionalGeneration
from ptuning.families.chatglm4.tokenizer import PATTERN, ChatGLM4Tokenizer
from tests.conftest import CORPUS

# In the official one's form, its words about tools shortened.
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n# 可用工具"
    "{% for tool in item['tools'] %}\n\n## {{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}"
    "{% endfor %}{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def learned_ranks(size: int = 420) -> dict[bytes, int]:
    """Token → rank, in a tiktoken file's order: the bytes, then what was merged first."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 9, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {bytes(letters[letter] for letter in token): rank for token, rank in found}


def write_ranks(ranks: dict[bytes, int], folder: Path) -> Path:
    """Its tokenizer.model."""
    path = folder / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def write_folder(folder: Path) -> Path:
    """All files of a model."""
    tokenizer = ChatGLM4Tokenizer(str(write_ranks(learned_ranks(), folder)), chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "kv_channels": 16}
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    rest = {"multi_query_group_num": 2, "padded_vocab_size": len(tokenizer) + 6, "seq_length": 512, "rope_ratio": 500}
    rest |= {"layernorm_epsilon": 1e-6, "add_qkv_bias": True, "eos_token_id": stops, "pad_token_id": stops[0]}
    ChatGLM4ForConditionalGeneration(ChatGLM4Config(**sizes, **rest, initializer_range=0.15)).save_pretrained(folder)
    return folder
