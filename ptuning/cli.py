"""The installed command: `ptuning train | evaluate | predict | validate-data | compare | report | serve | chat | export | …`.

A command's module is imported when the command is called, so that `ptuning --help` answers at once.
"""

import difflib
import importlib
import sys
from dataclasses import dataclass
from importlib import metadata

from ptuning.errors import PTuningError


@dataclass(frozen=True)
class Command:
    """Where a command is, and what the overview says of it.

    Args:
        function: `module:name`, called with the arguments after the command; returns the exit status, None being 0.
        about: one or more lines.
        options: `module:name` of the class that declares its options; empty: those of a run.
    """

    function: str
    about: str
    options: str = ""


COMMANDS = {
    "train": Command(
        "ptuning.main:train_command",
        "tune a prefix or all weights: RUN.yaml and any option, e.g. configs/ptuning_demo.yaml",
    ),
    "evaluate": Command(
        "ptuning.main:evaluate_command",
        "answer a test file with a tuned model and score the answers: RUN, the folder of a training run, …\n"
        "or --ptuning_checkpoint DIR --test_file FILE …",
    ),
    "predict": Command(
        "ptuning.evaluation.answer_file:predict_command",
        "answer the questions of a file, without scores: --file ROWS --output ANSWERS.jsonl --ptuning_checkpoint DIR",
        "ptuning.evaluation.answer_file:PredictOptions",
    ),
    "validate-data": Command(
        "ptuning.validation.command:validate_command",
        "check data files, report lengths and duplicates, write clean rows: FILE …",
        "ptuning.validation.command:ValidateOptions",
    ),
    "compare": Command(
        "ptuning.evaluation.compare:compare_command",
        "two runs, or a run and its base, on the same rows: is the difference more than noise? RUN_A [RUN_B]",
        "ptuning.evaluation.compare:CompareOptions",
    ),
    "report": Command(
        "ptuning.report:report_command",
        "render a run's report.html again, or one page over several runs: RUN …",
        "ptuning.report.page:ReportOptions",
    ),
    "serve": Command(
        "ptuning.serving.command:serve_command",
        "REST, OpenAI's format and a web page, many prefixes on one base: --model DIR --prefix NAME=DIR …",
        "ptuning.serving.options:ServeOptions",
    ),
    "chat": Command(
        "ptuning.serving.chat:chat",
        "talk to a model in the terminal: --ptuning_checkpoint DIR",
        "ptuning.serving.chat:ChatOptions",
    ),
    "fill": Command(
        "ptuning.generation.fill:fill_command",
        'fill the blanks of a text with GLM-130B, or write on: --model DIR --text "… [MASK] …"',
        "ptuning.generation.fill:FillOptions",
    ),
    "export": Command(
        "ptuning.export:export",
        "write a prefix for other programs: --ptuning_checkpoint DIR --format official|peft --output_dir DIR\n"
        "put a LoRA into its base's weights: --ptuning_checkpoint DIR --merge --output_dir DIR\n"
        "or merge a DeepSpeed ZeRO checkpoint into a model folder: --checkpoint DIR --output_dir DIR",
        "ptuning.export:ExportOptions",
    ),
    "quantize": Command(
        "ptuning.checkpoint.quantize:quantize_command",
        "write a base as an official int8 or int4 folder: --model DIR --bits 4|8 --output_dir DIR",
        "ptuning.checkpoint.quantize:QuantizeOptions",
    ),
    "merge-shards": Command(
        "ptuning.checkpoint.merge_shards:merge_command",
        "an official divided checkpoint (GLM-130B) as a model folder, or divided anew: --checkpoint DIR --output_dir DIR",
        "ptuning.checkpoint.merge_shards:MergeOptions",
    ),
    "estimate": Command(
        "ptuning.training.estimate_command:estimate_command",
        "memory and disk that a training run needs, against what is there; the options of train, and --num_gpus N",
        "ptuning.training.estimate_command:EstimateOptions",
    ),
    "convert": Command(
        "ptuning.export:convert",
        "make a DeepSpeed checkpoint resumable on another number of processes: --checkpoint DIR",
        "ptuning.export:ConvertOptions",
    ),
    "completion": Command(
        "ptuning.completion:completion_command",
        "a script that completes commands and options in your shell: bash or zsh",
        "ptuning.completion:CompletionOptions",
    ),
}
_PACKAGES = ("torch", "transformers", "peft", "deepspeed")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, or 2 for an error that is the input's."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name in ("--version", "-V", "version"):
        print(version())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: no command {name!r}{hint} (there are {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    try:
        return load(command.function)(rest) or 0
    except PTuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def usage() -> str:
    """The overview of all commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: ptuning COMMAND [options]", ""]
    for name, command in COMMANDS.items():
        first, *more = command.about.splitlines()
        lines += [f"  {name:{width}}{first}", *(f"  {'':{width}}{line}" for line in more)]
    return "\n".join(
        [*lines, "", "ptuning COMMAND --help lists the options; ptuning --version says what is installed."]
    )


def version() -> str:
    """Of this package and of those that its numbers depend on."""
    found = []
    for name in ("ptuning", *_PACKAGES):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    first, *others = found
    return f"{first} ({', '.join(others)}, Python {sys.version.split()[0]})"


def load(place: str):
    """What `module:name` means."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
