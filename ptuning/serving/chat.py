"""`ptuning chat`: a dialogue in the terminal, on the engine that serves."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ptuning.errors import ConfigError, PTuningError
from ptuning.generation import Engine, Request, Sampling
from ptuning.methods import read_checkpoint
from ptuning.serving.backend import BASE, BackendError
from ptuning.serving.detokenize import AnswerText
from ptuning.serving.faults import Fault
from ptuning.serving.limits import Prompts
from ptuning.serving.models import Loaded, Models

HELP = "/clear forgets the dialogue, /prefix NAME|DIR|none changes the prefix, /exit leaves."
_PAST_TOKENS = 8192  # more than any dialogue has; keys and values of earlier turns aren't computed again


def chat(argv: Sequence[str]) -> None:
    """Asks until /exit or the end of the input.

    Raises:
        PTuningError: the model or the checkpoint can't be loaded.
    """
    args = _parser().parse_args(argv)
    if args.ptuning_checkpoint is not None:
        read_checkpoint(args.ptuning_checkpoint)  # damaged: say so before the base is loaded
    models = Models.load(base_of(args.model_name_or_path, args.ptuning_checkpoint), args.dtype)
    sampling = Sampling(args.temperature, args.top_p) if args.temperature > 0 else Sampling()
    with Engine(models.model, models.tokenizer.eos_token_id, past_tokens=_PAST_TOKENS) as engine:
        dialogue = Dialogue(models, engine, sampling, args.max_new_tokens)
        if args.ptuning_checkpoint is not None:
            dialogue.choose(args.ptuning_checkpoint)
        print(HELP)
        while (question := _input()) not in (None, "/exit"):
            command, _, rest = question.partition(" ")
            if question == "/clear":
                dialogue.history.clear()
            elif command == "/prefix":
                dialogue.change(rest.strip())
            elif question:
                dialogue.answer(question)


class Dialogue:
    """Questions and answers so far, and the model that answers.

    Args:
        models: the base and the prefixes chosen so far.
        engine: entered.
        sampling: how tokens are chosen.
        max_new_tokens: of an answer.
    """

    def __init__(self, models: Models, engine: Engine, sampling: Sampling, max_new_tokens: int):
        self.models, self.engine, self.sampling, self.max_new_tokens = models, engine, sampling, max_new_tokens
        self.prompts = Prompts(models.tokenizer, models.model.config.max_position_embeddings)
        self.model: Loaded = models.base
        self.history: list[tuple[str, str]] = []

    def choose(self, name: str) -> None:
        """Changes the model: `none` or the base's name is the base, otherwise a prefix that was chosen before, or a folder.

        Raises:
            PTuningError: the folder isn't a prefix of this base.
        """
        known = {loaded.served.name: loaded for loaded in self.models}
        if name in ("none", BASE):
            self.model = self.models.base
        elif name in known:
            self.model = known[name]
        else:
            self.model = self.models.read(_free_name(Path(name).resolve().name, known), name)
            self.models.add(self.model)

    def change(self, name: str) -> None:
        """`/prefix`: says what is there, or changes it."""
        if name:
            try:
                self.choose(name)
            except (PTuningError, BackendError) as error:
                print(f"error: {error}")
        print(f"{self.model.served.name} answers; there are {', '.join(loaded.served.name for loaded in self.models)}")

    def answer(self, question: str) -> None:
        """Prints the answer as it is made."""
        served = self.model.served
        try:
            prompt = self.prompts.chat(
                question, self.history, source_prefix=served.source_prefix, max_new_tokens=self.max_new_tokens
            )
        except Fault as fault:
            print(f"error: {fault.message}")
            return
        if prompt.dropped:
            self.history = self.history[prompt.dropped :]
            print(f"({prompt.dropped} old turns no longer fit and are forgotten)")
        print("答：", end="", flush=True)
        self.engine.add(Request(0, prompt.ids, prompt.max_new_tokens, self.sampling, prefix=self.model.prefix))
        text, whole = AnswerText(self.models.tokenizer), ""
        try:
            while self.engine.has_work:
                for token in self.engine.step():
                    part = text.push(token).text
                    whole += part
                    print(part, end="", flush=True)
        except KeyboardInterrupt:  # stops the answer, not the dialogue
            self.engine.cancel(0)
        print()
        self.history.append((question, whole))


def base_of(model_name_or_path: str | None, ptuning_checkpoint: str | None) -> str:
    """The base that was given, or the one that the checkpoint names.

    Raises:
        ConfigError: neither says it.
    """
    if model_name_or_path is not None:
        return model_name_or_path
    if ptuning_checkpoint is None:
        raise ConfigError("give --model_name_or_path, --ptuning_checkpoint, or both")
    description = read_checkpoint(ptuning_checkpoint)
    if description is None:
        raise ConfigError(f"{ptuning_checkpoint} doesn't say which base it belongs to; give --model_name_or_path")
    return description.base.name_or_path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ptuning chat", allow_abbrev=False, epilog=HELP)
    parser.add_argument("--model_name_or_path", help="default: the base that the checkpoint names")
    parser.add_argument("--ptuning_checkpoint", help="a tuned prefix; /prefix takes it off again")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.8)
    return parser


def _input() -> str | None:
    try:
        return input("问：").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _free_name(name: str, taken: dict[str, Loaded]) -> str:
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(each for each in names if each not in taken and each not in (BASE, "none"))
