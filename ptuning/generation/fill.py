"""`ptuning fill`: fills the blanks of a text one after the other, or writes on behind it, with a model that was trained to.

Source: THUDM/GLM-130B `generate.py`, `fill_blanks`. Two things differ: kinds of blanks that stand beside a [MASK] are filled too,
behind it; and a model never writes a blank of its own, of which the official code would go on to fill in another.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ptuning.config import ModelArguments
from ptuning.config.commands import option, parse_options, same_option
from ptuning.errors import ConfigError, GenerationError
from ptuning.families import Template, family_of
from ptuning.families.template import Blanks
from ptuning.loading import load_model
from ptuning.methods import base_of


@dataclass(frozen=True)
class FillOptions:
    """Which model, which text, and how it is continued."""

    text: tuple[str, ...] = option(
        ..., "with [MASK] (a few words), or [gMASK] or nothing at its end (write on); several texts: give it again"
    )
    model: str | None = option(
        None, "folder; default: the base that the checkpoint names", aliases=("--model_name_or_path",)
    )
    ptuning_checkpoint: str | None = option(None, "a tuned prefix or LoRA")
    dtype: str = option("auto", "of the base: auto, float32, bfloat16 or float16")
    quantization_bit: int | None = same_option(ModelArguments, "quantization_bit")
    max_new_tokens: int = option(128, "tokens of a blank")
    temperature: float = option(0.0, "0 is greedy")
    top_p: float = option(1.0, "of sampling")
    seed: int = option(0, "of sampling")

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens is {self.max_new_tokens}; use at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"--temperature is {self.temperature} and --top_p {self.top_p}; use 0 or more, and above 0 up to 1"
            )
        if self.temperature == 0 and self.top_p != 1:
            raise ConfigError("--top_p is for sampling: give a --temperature above 0, or leave it out")


def fill_command(argv: Sequence[str]) -> None:
    """Prints each text with its blanks filled in.

    Raises:
        PTuningError: an option or the model can't be used, or as `fill`.
    """
    options = parse_options(FillOptions, argv, "ptuning fill", __doc__)
    base = base_of(options.model, options.ptuning_checkpoint)
    model, tokenizer = load_model(
        base, options.ptuning_checkpoint, dtype=options.dtype, quantization_bit=options.quantization_bit
    )
    template = family_of(model.config).template(tokenizer)
    torch.manual_seed(options.seed)
    for text in options.text:
        print(fill(model, template, text, options.max_new_tokens, options.temperature, options.top_p))


def fill(
    model: PreTrainedModel,
    template: Template,
    text: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """The text with its blanks filled in.

    Args:
        model: of a family that fills blanks, in eval mode.
        template: of its tokenizer.
        text: without a blank it is continued.
        max_new_tokens: of each blank.
        temperature: 0 is greedy.
        top_p: of sampling.

    Raises:
        GenerationError: the model fills no blanks, or the text is too long for it.
    """
    blanks = _blanks_of(template)
    ids = _context(template, blanks, text)
    kinds = [template.tokenizer.tokens[kind] for kind in _kinds(template, blanks)]
    while blank := next((token for token in kinds if token in ids), None):
        at = ids.index(blank)
        ids = ids[:at] + _written(model, template, blanks, ids, max_new_tokens, temperature, top_p) + ids[at + 1 :]
    return template.decode(ids)


def _blanks_of(template: Template) -> Blanks:
    if template.blanks is None:
        raise GenerationError(f"a model with the template {template.name} fills no blanks; use ptuning chat or predict")
    return template.blanks


def _kinds(template: Template, blanks: Blanks) -> list[str]:
    """Of blanks, those that the vocabulary has."""
    return [kind for kind in blanks.kinds if kind in template.tokenizer.tokens]


def _context(template: Template, blanks: Blanks, text: str) -> list[int]:
    """The text's ids, blanks among them; one behind it where it has none, and the end's token where it doesn't end with one."""
    tokens = template.tokenizer.tokens
    names = _kinds(template, blanks)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)  # text, blank, text, …, text
    if len(parts) == 1:
        parts += [names[-1], ""]
    encoded = template.encode_text(parts[0::2])
    ids = list(encoded[0])
    for name, piece in zip(parts[1::2], encoded[1:], strict=True):
        ids += [tokens[name], *piece]
    return ids if parts[-1] == "" else [*ids, tokens[blanks.end]]


def _written(
    model: PreTrainedModel,
    template: Template,
    blanks: Blanks,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[int]:
    """What the model writes for the first blank that is to be filled in."""
    tokens = template.tokenizer.tokens
    row = torch.tensor([[*ids, tokens[blanks.start]]], device=model.device)
    limit = model.config.max_position_embeddings
    room = min(max_new_tokens, limit - row.shape[1])
    if room < 1:
        raise GenerationError(
            f"the text has {row.shape[1]} tokens with its blanks, and the model reads {limit} with what it writes; shorten the text"
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=room,
        eos_token_id=list(template.stop_ids),
        pad_token_id=template.pad_id,
        suppress_tokens=[tokens[name] for name in (*_kinds(template, blanks), blanks.start)],
        **sampling,
    )
    new = output[0, row.shape[1] :].tolist()
    return new[:-1] if new and new[-1] in template.stop_ids else new
