"""Trains on rows that all processes of torchrun divide, and saves what came of it: FOLDER."""

import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__)

# Name → options; each of few rows a step, so that neighbours in a step differ in length.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"kernels": "plain", "train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2},
    "fast": {"kernels": "fast", "tokens_per_batch": 100, "gradient_checkpointing": True},
    "projection": {"kernels": "fast", "prefix_projection": True, "learning_rate": 1e-3},
}


def train(folder: Path, name: str, together: int | None, resume: bool = False) -> dict[str, Any]:
    """Trains four steps of a run. Returns losses, eval loss, gradient norms, the prefix's tensors, and the tokens of each pass."""
    import torch
    from transformers import AutoModelForCausalLM

    from ptuning.checkpoint.manifest import describe
    from ptuning.config import TuningArguments
    from ptuning.data.batch import RowDataset
    from ptuning.data.encode import IGNORE, EncodedRow
    from ptuning.families.chatglm2.template import ChatGLM2Template
    from ptuning.kernels import TORCH, divide_positions, swap
    from ptuning.methods import PrefixMethod
    from ptuning.methods.prefix.attach import prefix_of
    from ptuning.training.trainer import TuningTrainer
    from tests.conftest import REPO
    from tests.training.test_trainer import Tokenizer, some_rows

    options = dict(RUNS[name])
    kernels, projection = options.pop("kernels"), options.pop("prefix_projection", False)
    # The first rows' answers are at their ends, so that the first process of a step has no label.
    rows = [EncodedRow(ids, [IGNORE] * 28 + ids[28:], "late") for ids in ([*range(3, 3 + n)] for n in (31, 30, 33, 29))]
    rows += some_rows(17)
    base = REPO / "tests" / "golden" / "chatglm2-tiny"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    method = PrefixMethod(8, projection)
    method.start(model)
    if kernels == "fast":
        swap(model, TORCH)
    if together is not None:
        divide_positions(model)
    args = TuningArguments(
        output_dir=str(folder / f"run-{name}-{together}"),
        use_cpu=True,
        per_device_train_batch_size=4,
        sequence_parallel=together,
        max_steps=4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": 2e-2} | options,
    )
    trainer = TuningTrainer(
        model=model,
        args=args,
        method=method,
        template=ChatGLM2Template(Tokenizer()),
        manifest=describe(base, method.name, method.settings()),
        train_dataset=RowDataset(rows),
        eval_dataset=RowDataset(some_rows(7, seed=1)),
    )
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    watching = embedding.register_forward_pre_hook(lambda module, given: seen.append(given[0].numel()))
    trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-2") if resume else None)
    watching.remove()
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "rate": log[-1]["train_samples_per_second"] / log[-1]["train_steps_per_second"],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "prefix": {key: tensor.detach().clone() for key, tensor in prefix_of(model).state_dict().items()},
        "tokens": seen,
    }


def train_by_options(folder: Path, *more: str) -> int:
    """The command line: two steps, the eval loss and answers into FOLDER/out."""
    from ptuning.main import main
    from tests.conftest import REPO

    file = str(folder / "rows.json")
    flags = ["--do_train", "--do_eval", "--do_predict", "--model_name_or_path", str(REPO / "models" / "chatglm2-tiny")]
    flags += ["--train_file", file, "--validation_file", file, "--test_file", file, "--prompt_column", "q"]
    flags += ["--response_column", "a", "--report_to", "none", "--pre_seq_len", "4", "--max_steps", "2", "--baseline"]
    flags += ["--per_device_train_batch_size", "3", "--val_max_target_length", "4", "--output_dir", str(folder / "out")]
    return main([*flags, *more])


if __name__ == "__main__":
    sys.path[0] = str(SCRIPT.parents[2])  # the tests' own modules

    import torch
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    found = {name: train(folder, name, 2) for name in RUNS}
    found["resumed"] = train(folder, "fast", 2, resume=True)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    sys.exit(train_by_options(folder, "--sequence_parallel", "2"))  # ends the process group
