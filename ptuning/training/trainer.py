"""transformers' Trainer for any method: exact resume, atomic checkpoints, no silent NaN."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ptuning.checkpoint.manifest import Manifest
from ptuning.checkpoint.model_folder import require_space
from ptuning.checkpoint.partitioned import whole_shape
from ptuning.config import TuningArguments
from ptuning.data.batch import LengthGroupedSampler, PadRight, RowDataset
from ptuning.data.positions import OwnPositions, SharedBatches
from ptuning.data.token_batches import TokenBatchSampler
from ptuning.distributed import raise_together
from ptuning.errors import TrainingError
from ptuning.families import Template
from ptuning.families.logits import label_loss, label_positions, logits_of_labels
from ptuning.kernels import compile_layers
from ptuning.methods import Method, SaveTarget
from ptuning.runs.folder import STAGING, TRAINER_STATE
from ptuning.training.batches import evaluation_batches, order_seed, token_batches
from ptuning.training.pieces import pieces
from ptuning.training.progress import Throughput


class TuningTrainer(Trainer):
    """Trains what requires grad and saves what was tuned.

    Args:
        method: says what is saved and restored; None where nothing is trained.
        template: of the base; its tokenizer is saved beside a complete model.
        manifest: written into every checkpoint.
        pad_to: pad every row to this many tokens (the official way) instead of to the batch's longest.
        micro_batch_tokens: each batch is taken in pieces of so many tokens at most (pieces.py); 0: in one.
        score_answers: generates and scores answers to the validation rows; its figures join those of `evaluate` during
            training, so that the best checkpoint can be chosen by them.
        **kwargs: of Trainer; the data sets are RowDatasets.
    """

    def __init__(
        self,
        *,
        method: Method | None,
        template: Template,
        manifest: Manifest | None,
        pad_to: int | None = None,
        score_answers: Callable[[], dict[str, float]] | None = None,
        micro_batch_tokens: int = 0,
        **kwargs,
    ):
        collator = PadRight(template.pad_id, pad_to)
        super().__init__(
            processing_class=template.tokenizer,
            data_collator=collator,
            compute_loss_func=self._loss_of_labels,
            **kwargs,
        )
        _complete_token_ids(self.model, template.tokenizer)
        if self.args.torch_compile:  # accelerate would compile the model as a whole, which takes a minute and more
            compile_layers(self.model, self.args.torch_compile_backend or "inductor", self.args.torch_compile_mode)
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        self._method, self.manifest, self.score_answers = method, manifest, score_answers
        self.micro_batch_tokens = micro_batch_tokens
        # None: transformers finds out that `_loss_of_labels` has divided by the labels of the whole accumulation. False: it
        # divides each loss by the number of accumulation steps itself.
        self.loss_is_scaled_for_ga = False if self.args.loss_average == "rows" else None
        self._throughput = Throughput(self.args.world_size, self.args.row_takers)
        self.add_callback(SamplerEpoch())

    @property
    def method(self) -> Method:
        """Of a trainer that trains."""
        assert self._method is not None
        return self._method

    # --- data order -------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: RowDataset | None = None):
        dataset = train_dataset or self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        batch = self.args.per_device_train_batch_size * self.args.row_takers
        return LengthGroupedSampler(dataset.lengths, batch, order_seed(self.args))

    def token_batches(self) -> TokenBatchSampler | None:
        """The order of --tokens_per_batch; None without it."""
        return token_batches(self.args, self.train_dataset.lengths)

    def get_train_dataloader(self) -> DataLoader:
        args, together = self.args, self.args.sequence_parallel or 1
        batches: Sampler[list[int]] | None = self.token_batches()
        if batches is None and together == 1:
            return super().get_train_dataloader()
        if batches is None:
            rows = self._get_train_sampler()
            batches = BatchSampler(rows, args.per_device_train_batch_size, args.dataloader_drop_last)
        collate: Callable = self.data_collator
        if together > 1:
            batches = SharedBatches(batches, together)
            collate = OwnPositions(self.data_collator, args.process_index, together)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: TuningArguments) -> int:
        """Rows of a step, on average; for the rate that is logged at the end."""
        sampler = self.token_batches()
        if sampler is None:
            return super().get_total_train_batch_size(args) // (args.sequence_parallel or 1)
        rows = len(sampler.lengths) / len(sampler)
        return round(rows * args.gradient_accumulation_steps * args.row_takers)

    # --- loss -------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """The labels of all forward passes of a step; None where each is divided by its own."""
        return None if self.args.loss_average == "rows" else super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        rows = inputs.pop("row")
        with logits_of_labels(model, inputs["labels"]):
            loss = super().compute_loss(model, inputs | {"use_cache": False}, num_items_in_batch=num_items_in_batch)
        if model.training:
            problem = None
            if not torch.isfinite(loss):
                sources = ", ".join(self.train_dataset.rows[int(row)].source for row in rows)
                problem = (
                    f"step {self.state.global_step + 1}: the loss is {float(loss.detach())} on {sources}. "
                    f"{self._last_checkpoint()} Try a lower --learning_rate, --warmup_steps, or look at these rows."
                )
            if self.micro_batch_tokens:  # processes have different numbers of pieces, and ask each other once a step
                self._problem = self._problem or problem
            else:
                raise_together(problem, self.args.device)
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.is_deepspeed_enabled:  # its engine moves on to the next step's rate before the rate is logged
            self._step_rate = super()._get_learning_rate()
        self._throughput.count(inputs["input_ids"], self.data_collator.pad_token_id)
        if not self.micro_batch_tokens:
            return super().training_step(model, inputs, num_items_in_batch)
        self._problem, losses = None, []
        # Where each forward pass has its own average (--loss_average rows), it is the batch's.
        self._batch_labels = (
            max(int(label_positions(inputs["labels"]).sum()), 1) if num_items_in_batch is None else None
        )
        lengths = [int(self.train_dataset.lengths[row]) for row in inputs["row"]]
        parts = list(pieces(inputs, lengths, self.micro_batch_tokens, trims=self.data_collator.length is None))
        for part in parts:  # processes add their gradients up in the last one
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        self._batch_labels = None
        raise_together(self._problem, self.args.device)
        return torch.stack(losses).sum()

    def _loss_of_labels(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        return label_loss(
            outputs.logits, labels, self._batch_labels if num_items_in_batch is None else num_items_in_batch
        )

    def _get_learning_rate(self) -> float:
        return super()._get_learning_rate() if self._step_rate is None else self._step_rate

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self.accelerator.optimizer_step_was_skipped:  # DeepSpeed has already tried the step and left it out
            self.overflow_steps += 1
            norm = math.nan if not self.args.fp16 else norm
        # With fp16 the loss scaler expects overflows and skips those steps itself.
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient norm is {float(norm)}; the weights were left as they "
                f"were. {self._last_checkpoint()} Try a lower --learning_rate."
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.fp16 and "learning_rate" in logs:
            logs["overflow_steps"] = self.overflow_steps
        if "loss" in logs:
            logs |= self._throughput.report()
        with self._throughput.paused():  # a report may be written
            super().log(logs, start_time)

    def _last_checkpoint(self) -> str:
        saved = sorted(Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda p: p.stat().st_mtime)
        return f"The last good checkpoint is {saved[-1]}." if saved else "No checkpoint had been saved yet."

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss a token over the whole set: the same figure whatever the batch size and the number of processes.

        During training the scores of `score_answers` stand beside it.
        """
        with self._throughput.paused():
            return self._loss_and_scores(eval_dataset, metric_key_prefix)

    def _loss_and_scores(self, eval_dataset: RowDataset | None, metric_key_prefix: str) -> dict[str, float]:
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        self.prepare_for_evaluation()
        started, model = time.perf_counter(), self.model_wrapped
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch, weight in self._evaluation_batches(dataset):
                tokens = int((batch["labels"][:, 1:] != -100).sum())
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, self._prepare_inputs(batch))
                totals += weight * torch.tensor([float(loss) * tokens, tokens], device=totals.device)
        model.train(was_training)
        loss_sum, tokens = self.accelerator.reduce(totals, "sum").tolist()
        loss = loss_sum / max(tokens, 1)
        seconds = time.perf_counter() - started
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
            f"{metric_key_prefix}_rows": len(dataset),
            f"{metric_key_prefix}_seconds": round(seconds, 2),
        }
        if self.score_answers is not None and self.is_in_train:
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.score_answers().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_batches(self, dataset: RowDataset) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
        for rows, weight in evaluation_batches(self.args, dataset.lengths):
            yield self.data_collator([dataset[row] for row in rows]), weight

    def prepare_for_evaluation(self) -> None:
        """Under ZeRO-3 without training before: the hooks that gather each layer for `evaluate` and `generate`."""
        if not is_deepspeed_zero3_enabled() or self.deepspeed is not None:
            return
        deepspeed_init(self, num_training_steps=0, inference=True)
        self.model_wrapped = self.deepspeed = self.accelerator.prepare(self.model)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After the last step, before the tuned checkpoint is saved."""
        self.method.finish(self.model)
        if self.manifest is not None:
            self.manifest = replace(self.manifest, settings=self.method.settings())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        target = SaveTarget(
            Path(output_dir or self.args.output_dir), self.args.should_save, self.args.device, self.state.global_step
        )
        self.method.save(self._bare_model(), self.processing_class, self.manifest, target)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes into a staging folder and renames it, so that a `checkpoint-N` folder is always complete."""
        with self._throughput.paused():
            self._save_staged(model, trial)

    def _save_staged(self, model, trial) -> None:
        run = Path(self.args.output_dir)
        trained = (p for p in self.model.parameters() if p.requires_grad)
        require_space(
            run,
            self.method.saved_bytes(self._bare_model()),
            0 if self.args.save_only_model else sum(whole_shape(p).numel() for p in trained),
            deepspeed=self.is_deepspeed_enabled,
            device=self.args.device,
            checks=self.args.should_save,
        )
        staging, name = run / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_global_step == self.state.global_step:
            best = str(run / name)
        self.state.best_model_checkpoint = best
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / TRAINER_STATE))
            shutil.rmtree(run / name, ignore_errors=True)
            (staging / name).replace(run / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=best,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.method.keeps_base:
            # Each checkpoint would hold the frozen base too: 12 GB.
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    _problem: str | None = None  # of a piece
    _batch_labels: int | None = None
    _staging: str | None = None
    _step_rate: float | None = None
    overflow_steps = 0  # left out by the fp16 loss scaler

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.method.restore(self._bare_model(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _bare_model(self) -> PreTrainedModel:
        """Without what wraps it for several processes."""
        return self.accelerator.unwrap_model(self.model)


def _complete_token_ids(model: PreTrainedModel, tokenizer) -> None:
    """Ids that the base's configuration leaves open are the tokenizer's. transformers would set them too, with a notice that looks
    like a problem; ids that do differ it still reports."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(tokenizer, name, None))


class SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch. transformers and accelerate do so too, but under several processes they don't reach it where
    a resumed epoch skips steps, and the rest of that epoch would have the first one's order."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = train_dataloader
        while inner := getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None):
            sampler = inner
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))
