"""What a run evaluates: scores of base and tuned model on the same rows, and the forgetting probe."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ptuning.checkpoint.manifest import read_manifest
from ptuning.config import Config
from ptuning.data.encode import Encoder
from ptuning.data.formats import Record
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.answers import GenerationOptions, all_answers, all_losses
from ptuning.evaluation.compare import compare, require_same_rows
from ptuning.evaluation.metrics import METRICS, scores_table
from ptuning.evaluation.model import EvaluatedModel
from ptuning.evaluation.predictions import Questions, predict, read_predictions
from ptuning.evaluation.probe import Prober, probe_base, probe_tuned, read_probe, read_probe_base
from ptuning.families import Template
from ptuning.messages import message
from ptuning.methods import Method
from ptuning.runs import RunFolder
from ptuning.runs.files import read_json
from ptuning.runs.folder import BASE, PROBE, PROBE_BASE, TUNED, VALIDATION
from ptuning.runs.folder import METRICS as METRICS_FILE
from ptuning.runs.lines import delete_parts, write_lines


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation is asked for.

    Args:
        folder: of the run.
        generation: how to answer.
        base_name: folder or hub id that the model was loaded from.
        baseline: score the untuned base on the same rows too.
        baseline_from: folder of an earlier evaluation of the base, instead.
        probe: answer the general questions before and after tuning.
        trains: the run trains before it evaluates.
    """

    folder: RunFolder
    generation: GenerationOptions
    base_name: str
    baseline: bool = False
    baseline_from: Path | None = None
    probe: bool = False
    trains: bool = False

    @classmethod
    def of(cls, config: Config) -> "EvaluationSettings":
        """From the options of a run."""
        options, data, training = config.generation, config.data, config.training
        generation = GenerationOptions.of(options, data.max_source_length, data.eval_target_length, training.seed)
        return cls(
            RunFolder(training.output_dir),
            generation,
            config.model.model_name_or_path,
            options.baseline,
            None if options.baseline_from is None else Path(options.baseline_from),
            options.probe,
            training.do_train,
        )


class Evaluation:
    """Answers and scores into the run's folder; `results` is what metrics.json gets.

    Args:
        settings: what is asked for.
        model: tuned, where it is.
        template: of the model's family, over its tokenizer.
        encoder: of evaluation rows; makes those of the probe.
        method: how the model is or will be tuned; None: this run neither trains nor loads a tuned checkpoint.
        say: prints on the main process.

    Raises:
        ConfigError: the base is asked for and isn't there.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        model: EvaluatedModel,
        template: Template,
        encoder: Encoder,
        method: Method | None,
        say: Callable[[str], None],
    ):
        self.settings, self.model, self.template, self.encoder, self.say = settings, model, template, encoder, say
        self.results: dict[str, dict[str, Any]] = {}
        self._keeps_base = method is not None and method.keeps_base
        self._is_tuned = method is not None or _is_tuned(settings.base_name)
        self._base_probe: list[dict[str, Any]] | None = None
        self._prober = self._make_prober() if settings.probe else None
        self._check_base_is_there()
        earlier = settings.baseline_from
        self._earlier_base = {} if earlier is None else _base_scores(earlier)
        if self._prober is not None and earlier is not None and not self._keeps_base:
            self._base_probe = read_probe_base(earlier, self._prober.questions)
            if self._base_probe is None:
                raise ConfigError(
                    f"--baseline_from {earlier}: has no {PROBE_BASE}; evaluate the base again with --probe"
                )

    def before_training(self, test: Questions | None) -> None:
        """What only the untuned model can do, where training leaves no base."""
        if self._keeps_base:
            return
        if self.settings.baseline and test is not None:
            self._score("base", test)
        if self._prober is not None and self._base_probe is None:
            self._base_probe = probe_base(self._prober)

    def after_training(self, test: Questions | None) -> None:
        """Scores of the tuned model, with --baseline or --baseline_from beside the base's, and the probe.

        Args:
            test: None: the probe alone.
        """
        settings = self.settings
        if test is not None:
            if settings.baseline and self._keeps_base:
                with self.model.bare():
                    self._score("base", test)
            self._score("tuned" if self._is_tuned else "base", test)
            if settings.baseline_from is not None:
                self._take_over(settings.baseline_from)
        if self._prober is None:
            return
        base = self._base_probe
        if self._keeps_base or base is None:
            with self.model.bare():
                base = probe_base(self._prober)
        self._finish_probe(self._prober, base)

    def validation_scores(self, questions: Questions) -> dict[str, float]:
        """The scores of the present weights on the validation rows, without intervals and losses (the trainer has those)."""
        scores = self._predict(questions, VALIDATION, losses=False, shows_bar=False)
        if PartialState().is_main_process:
            delete_parts(self.settings.folder / VALIDATION)
        return {name: scores[name] for name, metric in METRICS.items() if not metric.from_losses}

    def summary(self) -> str:
        """The scores as a table, and what the probe found."""
        scored = {name: values for name, values in self.results.items() if name in ("base", "tuned")}
        lines = [scores_table(scored)] if scored else []
        if probe := self.results.get("probe"):
            line = message("probe", same=probe["same"], rows=probe["rows"])
            if probe["change"] is not None:  # None: the base's answers are all empty
                line += message("probe_losses", base_loss=probe["base_loss"], tuned_loss=probe["tuned_loss"])
            lines.append(line)
        return "\n".join(lines)

    def write(self, more: dict[str, dict[str, Any]]) -> Path:
        """metrics.json, on the main process. What was kept for going on after a stop is deleted.

        Args:
            more: results from elsewhere.
        """
        if PartialState().is_main_process:
            self.settings.folder.write_metrics(more | self.results | self._change())
            for name in (BASE, TUNED):
                delete_parts(self.settings.folder / name)
        return self.settings.folder / METRICS_FILE

    def _change(self) -> dict[str, dict[str, Any]]:
        """What tuning has changed, as `ptuning compare` says it, where both models answered."""
        if not {"base", "tuned"} <= set(self.results):
            return {}
        return {"change": compare(*(read_predictions(self.settings.folder / name) for name in (BASE, TUNED)))}

    def _check_base_is_there(self) -> None:
        settings = self.settings
        if settings.trains or self._keeps_base or not self._is_tuned or settings.baseline_from is not None:
            return
        for flag, wanted in (("baseline", settings.baseline), ("probe", settings.probe)):
            if wanted:
                raise ConfigError(
                    f"--{flag}: the base that {settings.base_name} was tuned from is not in that folder; evaluate the base "
                    "into a folder of its own and give --baseline_from FOLDER"
                )

    def _score(self, name: str, questions: Questions) -> None:
        self.say(message(f"answering_{name}", rows=len(questions.records)))
        started = time.perf_counter()
        self.results[name] = self._predict(questions, TUNED if name == "tuned" else BASE)
        self.say(message("seconds", seconds=time.perf_counter() - started))

    def _predict(self, questions: Questions, file: str, losses: bool = True, shows_bar: bool = True) -> dict[str, Any]:
        return predict(
            self.model,
            self.template,
            questions,
            self.settings.generation,
            self.encoder.lengths.max_target_length,
            self.settings.folder / file,
            self.say,
            losses,
            shows_bar,
        )

    def _take_over(self, folder: Path) -> None:
        """The base's scores and answers from an earlier run on the same rows."""
        ours = self.settings.folder / TUNED
        if PartialState().is_main_process:
            require_same_rows(folder / BASE, read_predictions(folder / BASE), ours, read_predictions(ours))
            shutil.copyfile(folder / BASE, self.settings.folder / BASE)
        self.results = {"base": self._earlier_base} | self.results

    def _make_prober(self) -> Prober:
        plain, options = Encoder(self.template, self.encoder.lengths), self.settings.generation

        def answer(records: list[Record]) -> list[tuple[str, bool]]:
            found = all_answers(self.model, self.template, plain.prompt_rows(records)[0], options, self.say)
            return [(answer.text, answer.finished) for answer in found]

        def losses(rows):
            return all_losses(self.model, rows, self.template.pad_id)

        return Prober(read_probe(), plain, self.template.end_id, answer, losses)

    def _finish_probe(self, prober: Prober, base: list[dict[str, Any]]) -> None:
        """The tuned model's half of the probe, where there is one; the files of both."""
        lines = None
        if self._is_tuned:
            lines, self.results["probe"] = probe_tuned(prober, base)
        if PartialState().is_main_process:
            write_lines(self.settings.folder / PROBE_BASE, base)
            if lines is not None:
                write_lines(self.settings.folder / PROBE, lines)


def _is_tuned(model_name_or_path: str) -> bool:
    """Whether a folder holds a model that was tuned before."""
    return Path(model_name_or_path).is_dir() and read_manifest(model_name_or_path) is not None


def _base_scores(folder: Path) -> dict[str, Any]:
    """Of an evaluation of the base; asked before anything is computed."""
    try:
        if not (folder / BASE).is_file():
            raise FileNotFoundError(folder / BASE)
        return read_json(folder / METRICS_FILE, "evaluate the base again")["base"]
    except (OSError, DataError, KeyError) as error:
        raise ConfigError(
            f"--baseline_from {folder}: has no scores of a base ({error!r}); evaluate the untuned base into it first: "
            f"ptuning evaluate --output_dir {folder} …"
        ) from error
