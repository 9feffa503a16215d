"""What a run evaluates: scores of base and tuned model on the same rows, and the forgetting probe."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import PartialState

from ptuning.checkpoint.manifest import read_manifest
from ptuning.config import Config
from ptuning.data.encode import Encoder
from ptuning.data.formats import Record
from ptuning.errors import ConfigError, DataError
from ptuning.evaluation.compare import require_same_rows
from ptuning.evaluation.generate import GenerationOptions
from ptuning.evaluation.lines import read_predictions
from ptuning.evaluation.predict import predict, table
from ptuning.evaluation.probe import read_probe
from ptuning.evaluation.probe_run import Prober, probe_base, probe_tuned, read_probe_base
from ptuning.evaluation.shares import shared_answers, shared_losses
from ptuning.evaluation.summary import FIGURES
from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer
from ptuning.methods.prefix.attach import attach_encoder, detach_prefix, prefix_of



from ptuning.runs import RunFolder
from ptuning.runs.files import read_json
from ptuning.runs.folder import BASE, METRICS, PROBE, PROBE_BASE, TUNED, VALIDATION
from ptuning.runs.lines import delete_parts, write_lines


class Evaluation:
    """Answers and scores into the run's folder; `results` is what metrics.json gets.

    Args:
        config: of the run.
        model: with the prefix attached, if there is one.
        tokenizer: the base's.
        encoder: of evaluation rows.
        say: prints on the main process.
    """

    def __init__(
        self,
        config: Config,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        encoder: Encoder,
        say: Callable[[str], None],
    ):
        self.config, self.model, self.tokenizer, self.encoder, self.say = config, model, tokenizer, encoder, say
        self.folder = RunFolder(config.training.output_dir)
        self.options = _options(config)
        self.results: dict[str, dict] = {}
        self._base_probe: list[dict] | None = None
        self._prober = self._make_prober() if config.generation.probe else None
        self._check_base_is_there()
        earlier = config.generation.baseline_from
        self._earlier_base = None if earlier is None else _base_scores(Path(earlier))
        if self._prober is not None and earlier is not None and prefix_of(model) is None:
            self._base_probe = read_probe_base(Path(earlier), self._prober.questions)
            if self._base_probe is None:
                raise ConfigError(
                    f"--baseline_from {earlier}: has no {PROBE_BASE}; evaluate the base again with --probe"
                )

    def before_training(self, records: Sequence[Record] | None) -> None:
        """What only the untuned model can do, where all weights are about to be trained."""
        if prefix_of(self.model) is not None:
            return
        if self.config.generation.baseline and records is not None:
            self._score("base", records)
        if self._prober is not None and self._base_probe is None:
            self._base_probe = probe_base(self._prober)

    def after_training(self, records: Sequence[Record] | None) -> None:
        """Scores of the tuned model, with --baseline or --baseline_from beside the base's, and the probe.

        Args:
            records: None: the probe alone.
        """
        settings, prefix = self.config.generation, prefix_of(self.model) is not None
        if records is not None:
            if settings.baseline and prefix:
                with self._untuned():
                    self._score("base", records)
            self._score("tuned" if self._is_tuned() else "base", records)
            if settings.baseline_from is not None:
                self._take_over(Path(settings.baseline_from))
        if self._prober is None:
            return
        if prefix:
            with self._untuned():
                self._base_probe = probe_base(self._prober)
        elif self._base_probe is None:
            self._base_probe = probe_base(self._prober)
        self._probe_again()

    def validation_scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The scores of the present weights on the validation rows, without intervals and losses (the trainer has those)."""
        scores = self._predict(records, VALIDATION, losses=False)
        if PartialState().is_main_process:
            delete_parts(self.folder / VALIDATION)
        return {name: scores[name] for name in FIGURES if not name.startswith("answer_")}

    def summary(self) -> str:
        """The scores as a table, and what the probe found."""
        scored = {name: values for name, values in self.results.items() if name in ("base", "tuned")}
        lines = [table(scored)] if scored else []
        if probe := self.results.get("probe"):
            line = f"Probe: {probe['same']:.0f} % of {probe['rows']} general answers unchanged"
            if probe["change"] is not None:  # None: the base's answers are all empty
                line += "; loss of the base's own answers {base_loss:.3f} before, {tuned_loss:.3f} after".format(
                    **probe
                )
            lines.append(line)
        return "\n".join(lines)

    def write(self, more: dict[str, dict]) -> Path:
        """metrics.json, on the main process. What was kept for going on after a stop is deleted.

        Args:
            more: results from elsewhere.
        """
        path = self.folder / METRICS
        if PartialState().is_main_process:
            self.folder.write_metrics(more | self.results)
            for name in (BASE, TUNED):
                delete_parts(self.folder / name)
        return path

    def _check_base_is_there(self) -> None:
        if self.config.training.do_train or prefix_of(self.model) is not None or not self._is_tuned():
            return
        settings, name = self.config.generation, self.config.model.model_name_or_path
        for flag, wanted in (("baseline", settings.baseline), ("probe", settings.probe)):
            if wanted and settings.baseline_from is None:
                raise ConfigError(
                    f"--{flag}: the base that {name} was tuned from is not in that folder; evaluate the base into a folder "
                    "of its own and give --baseline_from FOLDER"
                )

    def _score(self, name: str, records: Sequence[Record]) -> None:
        model = "tuned model" if name == "tuned" else "untuned base"
        self.say(f"Answering {len(records)} rows with the {model}")
        started = time.perf_counter()
        self.results[name] = self._predict(records, TUNED if name == "tuned" else BASE)
        self.say(f"  {time.perf_counter() - started:.1f} s")

    def _predict(self, records: Sequence[Record], file: str, losses: bool = True) -> dict:
        path = self.folder / file
        return predict(self.model, self.tokenizer, records, self.encoder, self.options, path, self.say, losses)

    def _is_tuned(self) -> bool:
        name = self.config.model.model_name_or_path
        trained_before = Path(name).is_dir() and read_manifest(name) is not None
        return self.config.training.do_train or prefix_of(self.model) is not None or trained_before

    @contextlib.contextmanager
    def _untuned(self) -> Iterator[None]:
        """Inside, the model is the bare base."""
        encoder = detach_prefix(self.model)
        try:
            yield
        finally:
            attach_encoder(self.model, encoder)

    def _take_over(self, folder: Path) -> None:
        """The base's scores and answers from an earlier run on the same rows."""
        ours = self.folder / TUNED
        if PartialState().is_main_process:
            require_same_rows(folder / BASE, read_predictions(folder / BASE), ours, read_predictions(ours))
            shutil.copyfile(folder / BASE, self.folder / BASE)
        self.results = {"base": self._earlier_base} | self.results

    def _make_prober(self) -> Prober:
        options = _options(self.config)

        def answer(records: list[Record]) -> list[tuple[str, bool]]:
            rows, _ = encoder.prompt_rows(records)
            found = shared_answers(self.model, self.tokenizer, rows, options, self.say)
            return [(answer.text, answer.finished) for answer in found]

        encoder = Encoder(self.encoder.template, self.encoder.lengths)
        return Prober(
            read_probe(),
            encoder,
            answer,
            lambda rows: shared_losses(self.model, rows, self.tokenizer.pad_token_id),
        )

    def _probe_again(self) -> None:
        """The tuned model's half of the probe, where there is one; the files of both."""
        lines = None
        if self._is_tuned():
            lines, self.results["probe"] = probe_tuned(self._prober, self._base_probe)
        if PartialState().is_main_process:
            write_lines(self.folder / PROBE_BASE, self._base_probe)
            if lines is not None:
                write_lines(self.folder / PROBE, lines)


def _base_scores(folder: Path) -> dict:
    """Of an evaluation of the base; asked before anything is computed."""
    try:
        if not (folder / BASE).is_file():
            raise FileNotFoundError(folder / BASE)
        return read_json(folder / METRICS, "evaluate again")["base"]
    except (OSError, DataError, KeyError) as error:
        raise ConfigError(
            f"--baseline_from {folder}: has no scores of a base ({error!r}); evaluate the untuned base into it first: "
            f"ptuning evaluate --output_dir {folder} …"
        ) from error


def _options(config: Config) -> GenerationOptions:
    settings, data = config.generation, config.data
    official = settings.generation_mode == "official"
    return GenerationOptions(
        max_new_tokens=data.eval_target_length,
        batch_tokens=settings.generation_batch_tokens,
        num_beams=settings.num_beams,
        sample=official,
        max_length=data.max_source_length + data.eval_target_length + 1 if official else None,
        seed=config.training.seed,
    )
