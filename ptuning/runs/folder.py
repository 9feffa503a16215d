"""A run's folder: the name of every file in it, what is written there, and what belongs to a run when another one begins."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptuning.errors import ConfigError
from ptuning.runs.files import TEMPORARY, read_json, read_json_if_possible, write_json
from ptuning.runs.lines import write_lines
from ptuning.runs.record import RunRecord

RECORD = "run.json"
RESUMED = "run-resumed-*.json"
EVALUATION = "evaluation.json"  # the record of a run that only evaluates
DATA = "data.json"
LOG = "log.jsonl"
CURVE = "loss_curve.png"
METRICS = "metrics.json"
TUNED = "predictions.jsonl"
BASE = "predictions_base.jsonl"
VALIDATION = "predictions_validation.jsonl"
PROBE = "probe.jsonl"
PROBE_BASE = "probe_base.jsonl"
BEST = "best.json"
OUTCOME = "outcome.json"
REPORT = "report.html"
LOCK = "run.lock"
CHECKPOINT = "checkpoint-*"
STAGING = ".saving"  # checkpoints are written here and renamed when complete
TRAINER_STATE = "trainer_state.json"
MANIFEST = "ptuning_config.json"  # of what was tuned, beside it
MANIFEST_1 = "ptuning_full.json"  # that of a whole model in earlier versions

_PARTS = tuple(f"{Path(name).stem}.part*.jsonl" for name in (TUNED, BASE, VALIDATION))
_PREFIX_TENSORS = f"prefix-{'[0-9a-f]' * 8}.safetensors"
# Losing these is losing work. The rest only says something about a run that left none.
_RESULTS = (CHECKPOINT, MANIFEST, MANIFEST_1, _PREFIX_TENSORS, METRICS, TUNED, BASE, PROBE, *_PARTS, PROBE_BASE, LOG)
_ABOUT = (
    RECORD,
    RESUMED,
    EVALUATION,
    DATA,
    VALIDATION,
    CURVE,
    BEST,
    OUTCOME,
    REPORT,
    STAGING,
    TRAINER_STATE,
    TEMPORARY,
)
# What a tuned model consists of; where no manifest says that it was tuned here, such files are from elsewhere and stay.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MODEL = (
    *_WEIGHTS[::2],
    "config.json",
    "generation_config.json",
    *_TOKENIZER,
    "added_tokens.json",
    "chat_template.jinja",
)
_TENSORBOARD = "runs/**/events.out.tfevents.*"


class RunFolder:
    """The folder of one run; nothing need be there yet.

    Args:
        path: --output_dir.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # --- what is there ---------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """The `checkpoint-N` folders, the latest last."""
        found = {step_of(path): path for path in self.path.glob(CHECKPOINT) if path.is_dir()}
        return [found[step] for step in sorted(step for step in found if step is not None)]

    def resumes(self) -> list[int]:
        """Steps at which the run was resumed."""
        texts = (path.stem.removeprefix("run-resumed-") for path in self.path.glob(RESUMED))
        return sorted(int(text) for text in texts if text.isdecimal())

    def latest_record(self) -> dict[str, Any]:
        """The newest readable record of the training; empty where there is none."""
        names = [*(RESUMED.replace("*", str(step)) for step in reversed(self.resumes())), RECORD]
        return next((values for name in names if (values := read_json_if_possible(self.path / name))), {})

    def record_at(self, step: int) -> RunRecord | None:
        """The record of the run that wrote `checkpoint-step`: of the last one resumed before it, else the first run's.

        Raises:
            DataError: it can't be read.
        """
        before = [resumed for resumed in self.resumes() if resumed < step]
        path = self.path / (RESUMED.replace("*", str(before[-1])) if before else RECORD)
        fix = "without it nothing says what the run was; start a new run from its checkpoint"
        return RunRecord.from_dict(read_json(path, fix)) if path.is_file() else None

    def results(self) -> list[str]:
        """Names of what a new run would put an end to: checkpoints, latest first, then weights, scores, answers and log."""
        names = [path.name for path in reversed(self.checkpoints())]
        return names + [path.name for path in self._matching(_RESULTS) if path.name not in names]

    def _matching(self, patterns: Iterable[str]) -> list[Path]:
        paths = dict.fromkeys(path for pattern in patterns for path in sorted(self.path.glob(pattern)))
        return [path for path in paths if not path.match(CHECKPOINT) or step_of(path) is not None]

    def _is_model_from_elsewhere(self) -> bool:
        return bool(self._matching(_WEIGHTS)) and not self._has_tuned_model()

    def _has_tuned_model(self) -> bool:
        """Whether the manifest is that of a whole model: one of a prefix names a file of its own and says nothing of others."""
        return read_json_if_possible(self.path / MANIFEST).get("file") == "" or (self.path / MANIFEST_1).is_file()

    def holds_run(self) -> bool:
        """Whether the work of a run lies here, be it only a prefix, a model or an evaluation."""
        return bool(self.results()) or self._is_model_from_elsewhere()

    def says_something(self) -> bool:
        """Whether there is anything to report on: a record, a log, scores or answers, be they only those of the base."""
        names = (RECORD, RESUMED, EVALUATION, LOG, DATA, METRICS, OUTCOME, TUNED, BASE, PROBE, PROBE_BASE, *_PARTS)
        return any(path.is_file() for path in self._matching(names))

    # --- room for a new run ----------------------------------------------------------------------------------------------

    def require_room(self, overwrite: bool, sources: Mapping[str, str | Path | None]) -> None:
        """Holds that a new training run may begin here; deletes nothing.

        Args:
            overwrite: --overwrite_output_dir.
            sources: flag → what the new run reads, such as {"--ptuning_checkpoint": …}; it must survive `clear`.

        Raises:
            ConfigError: a run is there and isn't to be overwritten, or the new run reads what `clear` would delete.
        """
        if self._is_model_from_elsewhere():
            raise ConfigError(
                f"{self.path} holds {self._matching(_WEIGHTS)[0].name}, a model that no run of this program wrote, so it is not "
                "overwritten; choose another --output_dir"
            )
        results = self.results()
        if results and not overwrite:
            raise ConfigError(
                f"{self.path} already holds {results[0]} of an earlier run. Continue it with --resume_from_checkpoint "
                "true, delete it with --overwrite_output_dir, or choose another --output_dir."
            )
        for flag, source in sources.items():
            place = None if source is None else Path(source).expanduser().resolve()
            if place is not None and any(_meets(place, path.resolve()) for path in self._belongings()):
                verb = "starts from" if flag == "--ptuning_checkpoint" else "reads"
                raise ConfigError(
                    f"--overwrite_output_dir would delete {source}, which {flag} {verb}; choose another --output_dir"
                )

    def clear(self) -> None:
        """Deletes what belongs to an earlier run and nothing else, so that no report shows another model's scores."""
        for path in self._belongings():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for folder in sorted(self.path.glob("runs/**/"), reverse=True):  # tensorboard's, deepest first
            if not any(folder.iterdir()):
                folder.rmdir()

    def _belongings(self) -> list[Path]:
        own = Path(str(read_json_if_possible(self.path / MANIFEST).get("file") or MANIFEST)).name
        model = _MODEL if self._has_tuned_model() else ()
        found = self._matching([*_RESULTS, *_ABOUT, _TENSORBOARD, *model])
        if (self.path / own).is_file():  # a method's tensors
            found = list(dict.fromkeys([*found, self.path / own]))
        # The manifest last, so that it says what the files are until all are gone.
        return sorted(found, key=lambda path: path.name in (MANIFEST, MANIFEST_1))

    # --- writing ---------------------------------------------------------------------------------------------------------

    def write_record(self, record: RunRecord, trains: bool = True) -> Path:
        """Writes run.json, or run-resumed-N.json beside it when a run is continued, or evaluation.json.

        Args:
            trains: False for a run that only evaluates, perhaps in the folder of the one that trained.
        """
        name = RECORD if trains else EVALUATION
        if record.resumed_from is not None:
            name = RESUMED.replace("*", str(step_of(Path(record.resumed_from))))
        return write_json(self.path / name, record.to_dict())

    def write_data(self, summaries: Mapping[str, dict]) -> Path:
        """Writes data.json; splits that an earlier command saw stay.

        Args:
            summaries: split → what is known of its rows.
        """
        return write_json(self.path / DATA, read_json_if_possible(self.path / DATA) | dict(summaries))

    def write_log(self, history: Sequence[dict]) -> Path:
        """The whole history each time: it is small, and so a resumed run's file has no gap and no double."""
        return write_lines(self.path / LOG, history)

    def write_metrics(self, results: Mapping[str, dict]) -> Path:
        """Writes metrics.json: base, tuned, change, validation and probe, those that were measured."""
        return write_json(self.path / METRICS, results)


def step_of(checkpoint: Path) -> int | None:
    """N of `checkpoint-N`; None for another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _meets(source: Path, doomed: Path) -> bool:
    """Whether deleting `doomed` would take something of `source`, a file or the folder of a model or a run."""
    return source.is_relative_to(doomed) or doomed.parent == source
