"""A model that vLLM computes, as what is evaluated."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ptuning.checkpoint.base import base_fingerprint
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.errors import CheckpointError
from ptuning.families import Template
from ptuning.generation import Generator
from ptuning.generation.vllm.check import check_folder
from ptuning.generation.vllm.generator import VllmGenerator
from ptuning.generation.vllm.replicas import Replicas, headers
from ptuning.methods import Companion, Stored, store_checkpoint


class VllmModel:
    """A base that vLLM has loaded, and a tuned checkpoint that it finds in the store. Its answers and losses are those of this
    package's engine, to rounding.

    Args:
        urls: of vLLM servers with the same model.
        key: vLLM's --api-key.
        base: --model_name_or_path; its weights are compared with vLLM's.
        checkpoint: a prefix or LoRA on it; None: the base as it is.
        store: the folder that vLLM reads tuned checkpoints from; without one nothing is put there.
        template: of the base.

    Raises:
        PTuningError: vLLM doesn't answer or would answer wrong; the checkpoint can't be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None,
        base: str,
        checkpoint: str | None,
        store: str | None,
        template: Template,
    ):
        self._replicas = Replicas(urls, headers(key))
        about = self._replicas.describe()
        self._fingerprint, self._most = base_fingerprint(base), about["max_model_len"]
        check_folder(about["root"], self._fingerprint)
        self._store, self._stop_ids = Path(store or "").expanduser(), template.stop_ids
        self._stored = Stored()
        if checkpoint is not None:
            try:
                self._stored, _, _ = store_checkpoint(checkpoint, base, self._store)
            except OSError as cause:
                raise CheckpointError(f"{checkpoint}: can't be put into --prefix_store {store} ({cause})") from cause

    @contextmanager
    def bare(self) -> Iterator[None]:
        tuned, self._stored = self._stored, Stored()
        try:
            yield
        finally:
            self._stored = tuned

    def key(self, *settings: object) -> str:
        return hashlib.sha256(repr((self._fingerprint, self._stored, settings)).encode()).hexdigest()[:16]

    def companion(self) -> Companion | None:
        """None: what is tuned is named to vLLM by its digest."""
        return None

    def answering(
        self, template: Template, batch_tokens: int, num_beams: int, say: Callable[[str], None]
    ) -> AbstractContextManager[Generator]:
        """vLLM decides how much it computes together; `config.engine` refuses beams."""
        return self._generator()

    def losses(self, rows: Sequence[EncodedRow], pad_id: int, filler: EncodedRow) -> list[tuple[float, int]]:
        labelled = [index for index, row in enumerate(rows) if any(label != IGNORE for label in row.labels[1:])]
        found = self._generator().prompt_logprobs([rows[index].input_ids for index in labelled])
        results = [(0.0, 0)] * len(rows)
        for index, logprobs in zip(labelled, found, strict=True):
            counted = [
                logprob for logprob, label in zip(logprobs, rows[index].labels[1:], strict=True) if label != IGNORE
            ]
            results[index] = (-sum(counted), len(counted))
        return results

    def _generator(self) -> VllmGenerator:
        return VllmGenerator(self._replicas, self._stop_ids, self._store, self._stored, self._most)
