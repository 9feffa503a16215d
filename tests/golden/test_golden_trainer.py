"""The trainer has the official loss curves: the golden twenty losses, and with accumulation the official formula's."""

import pytest
import torch

from ptuning.config import TuningArguments
from ptuning.data.batch import RowDataset
from ptuning.data.encode import IGNORE, EncodedRow
from ptuning.families.chatglm2.template import ChatGLM2Template
from ptuning.kernels import products, swap
from ptuning.methods.prefix.attach import prefix_of
from ptuning.training.trainer import TuningTrainer
from tests.golden.test_golden_training import LEARNING_RATE, STEPS, setup
from tests.training.test_trainer import Tokenizer


class Recording(TuningTrainer):
    """Keeps each step's loss as it is; the log rounds."""

    def train(self):
        self.micro = []
        super().train()
        steps = self.args.gradient_accumulation_steps
        return torch.tensor(self.micro).view(-1, steps).sum(1)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro.append(float(loss))
        return loss


@pytest.fixture
def losses(golden, load_tiny, tmp_path):
    """name and options → (the trainer's losses, the model); with a product it is that of the fast kernels."""

    def train(name, rows, product=None, micro_batch_tokens=0, **options):
        model = setup(load_tiny, name)
        if name == "full":
            model.requires_grad_(True)
        if prefix_of(model) is not None:
            prefix_of(model).dropout.p = 0.0  # the trainer turns on train()
        if product is not None:
            swap(model, product)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": LEARNING_RATE[name],
            "max_steps": STEPS,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        args = TuningArguments(**settings | options)
        template = ChatGLM2Template(Tokenizer())
        trainer = Recording(
            model=model,
            args=args,
            template=template,
            method=None,
            manifest=None,
            train_dataset=RowDataset(rows),
            micro_batch_tokens=micro_batch_tokens,
        )
        return trainer.train(), model

    return train


def golden_rows(golden):
    """Each four rows of the golden batch, without their padding."""
    rows = []
    for ids, labels in zip(golden["train.input_ids"], golden["train.labels"], strict=True):
        length = int((labels != IGNORE).nonzero().max()) + 1
        rows.append(EncodedRow(ids[:length].tolist(), labels[:length].tolist(), ""))
    return rows


def official(model, rows, learning_rate, batch, accumulation, processes=1):
    """What transformers 4.30 does with the official loss: the mean over each forward pass's labels, divided by the
    accumulation steps, averaged over processes; gradients clipped at 1, linear schedule, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses, at = [], 0
    for _ in range(STEPS):
        total = 0.0
        for _ in range(accumulation * processes):
            taken = [rows[(at + i) % len(rows)] for i in range(batch)]
            at += batch
            width = max(len(row.input_ids) for row in taken)
            ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in taken])
            labels = torch.tensor([row.labels + [IGNORE] * (width - len(row.labels)) for row in taken])
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE)
            (loss / accumulation / processes).backward()
            total += float(loss.detach()) / accumulation / processes
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses)


@pytest.mark.parametrize("loss_average", ["tokens", "rows"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", LEARNING_RATE)
def test_golden_losses(golden, losses, name, optim, loss_average):
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "loss_average": loss_average}
    found, _ = losses(name, golden_rows(golden), optim=optim, per_device_train_batch_size=4, **options)
    assert (found - golden[f"train.{name}.losses"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "loss_average"),  # in one piece, row by row, two rows and two
    [
        (0, True, "tokens"),
        (0, False, "rows"),
        (1, True, "rows"),
        (1, False, "tokens"),
        (40, True, "tokens"),
        (40, False, "rows"),
    ],
)
@pytest.mark.parametrize("product", products())
@pytest.mark.parametrize("name", ["prefix_embedding", "prefix_projection"])
def test_golden_losses_with_fast_kernels(golden, losses, name, product, tokens, checkpointing, loss_average):
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "loss_average": loss_average}
    options |= {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 4}
    found, _ = losses(name, golden_rows(golden), product, tokens, **options)
    assert (found - golden[f"train.{name}.losses"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", LEARNING_RATE)
def test_pieces_of_plain_kernels_have_the_golden_losses(golden, losses, name):
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_train_batch_size": 4}
    found, _ = losses(name, golden_rows(golden), micro_batch_tokens=40, **options)
    assert (found - golden[f"train.{name}.losses"]).abs().max() <= 1e-5


@pytest.mark.parametrize(("batch", "optim"), [(1, "adamw_torch"), (2, "adamw_torch_fused")])
@pytest.mark.parametrize("name", LEARNING_RATE)
def test_accumulation_as_the_official_trainer(golden, losses, load_tiny, name, batch, optim):
    rows = golden_rows(golden)
    assert len({sum(label != IGNORE for label in row.labels) for row in rows}) > 1  # else both averages were the same
    reference = setup(load_tiny, name)
    if name == "full":
        reference.requires_grad_(True)
    expected = official(reference, rows, LEARNING_RATE[name], batch, accumulation=4 // batch)
    options = {"optim": optim, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    found, model = losses(name, rows, loss_average="rows", **options)
    assert (found - expected).abs().max() <= 1e-5
    if prefix_of(model) is not None:
        ours, theirs = (prefix_of(each).embedding.weight for each in (model, reference))
        assert (ours - theirs).abs().max() <= 1e-4
    by_tokens, _ = losses(name, rows, loss_average="tokens", **options)
    assert (by_tokens - expected).abs().max() > 1e-4
