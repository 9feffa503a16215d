"""`ptuning chat`: a dialogue in the terminal, on the engine that serves."""

import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ptuning import distributed
from ptuning.config import ModelArguments
from ptuning.config.commands import option, parse_options, same_option
from ptuning.errors import PTuningError
from ptuning.families import Dialogue
from ptuning.generation import Engine, GenerationRequest, SamplingParams
from ptuning.methods import base_of, read_checkpoint
from ptuning.serving.backend import BASE, Served
from ptuning.serving.detokenize import AnswerText
from ptuning.serving.errors import ApiError
from ptuning.serving.models import LoadedModel, Registry
from ptuning.serving.options import ServeOptions
from ptuning.serving.prompts import PromptBuilder
from ptuning.serving.words import words

_CACHE_TOKENS = 8192  # more than any dialogue has; keys and values of earlier turns aren't computed again


@dataclass(frozen=True)
class ChatOptions:
    """How to talk."""

    model_name_or_path: str | None = option(None, "default: the base that the checkpoint names")
    ptuning_checkpoint: str | None = option(None, "a tuned prefix; /prefix takes it off again")
    dtype: str = option("auto", "of the base: auto, float32, bfloat16 or float16")
    device_map: str | None = same_option(ModelArguments, "device_map")
    tensor_parallel: int | None = same_option(ModelArguments, "tensor_parallel")
    quantization_bit: int | None = same_option(ModelArguments, "quantization_bit")
    quantization: str | None = same_option(ModelArguments, "quantization")
    double_quantization: bool = same_option(ModelArguments, "double_quantization")
    cpu_kernels: Literal["exact", "fast"] | None = same_option(ServeOptions, "cpu_kernels")
    kernels: Literal["fast", "plain"] | None = same_option(ServeOptions, "kernels")
    max_new_tokens: int = option(512, "tokens of an answer")
    temperature: float = option(0.0, "0 is greedy")
    top_p: float = option(0.8, "of sampling")


def chat(argv: Sequence[str]) -> None:
    """Asks until /exit or the end of the input.

    Raises:
        PTuningError: an option, the model or the checkpoint can't be used.
    """
    options = parse_options(ChatOptions, argv, "ptuning chat", words("help"))
    with distributed.session(), contextlib.ExitStack() as stack:
        if options.tensor_parallel is not None and not distributed.join():
            silence = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123  the first process speaks
            stack.enter_context(contextlib.redirect_stdout(silence))
        _talk(options)


def _talk(options: ChatOptions) -> None:
    if options.ptuning_checkpoint is not None:
        read_checkpoint(options.ptuning_checkpoint)  # damaged: say so before the base is loaded
    base = base_of(options.model_name_or_path, options.ptuning_checkpoint)
    asked = (options.quantization_bit, options.quantization, options.double_quantization)
    divided = options.device_map, options.tensor_parallel
    loaded = LoadedModel.load(base, options.dtype, *asked, options.cpu_kernels, *divided, print, options.kernels)
    sampling = SamplingParams()
    if options.temperature > 0:
        # Processes that compute one model must draw the same numbers.
        seed = None if options.tensor_parallel is None else distributed.of_main_process(secrets.randbits(63))
        sampling = SamplingParams(options.temperature, options.top_p, seed=seed)
    with Engine(loaded.model, loaded.template.stop_ids, prefix_cache_tokens=_CACHE_TOKENS) as engine:
        conversation = Conversation(loaded, engine, sampling, options.max_new_tokens)
        if options.ptuning_checkpoint is not None:
            conversation.choose(options.ptuning_checkpoint)
        print(words("help"))
        while (question := _input()) not in (None, "/exit"):
            command, _, rest = question.partition(" ")
            if question == "/clear":
                conversation.history.clear()
            elif command == "/prefix":
                conversation.change(rest.strip())
            elif question:
                conversation.answer(question)


class Conversation:
    """Questions and answers so far, and the model that answers.

    Args:
        loaded: the base.
        engine: entered.
        sampling: how tokens are chosen.
        max_new_tokens: of an answer.
    """

    def __init__(self, loaded: LoadedModel, engine: Engine, sampling: SamplingParams, max_new_tokens: int):
        self.loaded, self.engine, self.sampling, self.max_new_tokens = loaded, engine, sampling, max_new_tokens
        self.prompts = PromptBuilder(loaded.template, loaded.context)
        self.registry = Registry(loaded.folder)
        self.model: Served = self.registry.base
        self.history: list[tuple[str, str]] = []

    def choose(self, name: str) -> None:
        """Changes the model: `none` or the base's name is the base, otherwise a prefix that was chosen before, or a folder.

        Raises:
            PTuningError: the folder isn't a prefix of this base.
        """
        known = {served.name: served for served in self.registry}
        if name in ("none", BASE):
            self.model = self.registry.base
        elif name in known:
            self.model = known[name]
        else:
            self.model = self.loaded.read_prefix(_free_name(Path(name).resolve().name, known), name)
            self.registry.add(self.model)

    def change(self, name: str) -> None:
        """`/prefix`: says what is there, or changes it."""
        if name:
            try:
                self.choose(name)
            except (PTuningError, ApiError) as error:
                print(words("error", text=error))
        print(words("answers", name=self.model.name, names=", ".join(served.name for served in self.registry)))

    def answer(self, question: str) -> None:
        """Prints the answer as it is made."""
        dialogue = Dialogue(question, tuple(self.history), source_prefix=self.model.source_prefix)
        try:
            prompt = self.prompts.chat(dialogue, max_new_tokens=self.max_new_tokens)
        except ApiError as error:
            print(words("error", text=error.message))
            return
        if prompt.dropped:
            self.history = self.history[prompt.dropped :]
            print(words("forgotten", turns=prompt.dropped))
        print("答：", end="", flush=True)
        request = GenerationRequest(0, prompt.ids, prompt.max_new_tokens, self.sampling, prefix=self.model.prefix)
        text, whole = AnswerText(self.loaded.template, prompt.stops), ""
        try:
            for token in self.engine.submit([request]):
                piece = text.push(token)
                whole += piece.text
                print(piece.text, end="", flush=True)
                if piece.finish is not None:
                    break
        except KeyboardInterrupt:  # stops the answer, not the dialogue
            if distributed.is_divided():  # the processes would stop at different tokens
                raise
        self.engine.cancel(0)  # interrupted, or ended by a text; else it is gone already
        print()
        self.history.append((question, whole))


def _input() -> str | None:
    """A line of the user's, on all processes; None at the end of the input."""
    line = None
    if distributed.is_main():
        try:
            line = input("问：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
    return distributed.of_main_process(line)


def _free_name(name: str, taken: dict[str, Served]) -> str:
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(each for each in names if each not in taken and each not in (BASE, "none"))
