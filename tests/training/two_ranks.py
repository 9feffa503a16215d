"""Trains three steps on two processes and saves what came of it: FILE TOKENS LOSS_AVERAGE."""

import sys
from pathlib import Path

SCRIPT = Path(__file__)

if __name__ == "__main__":
    sys.path[0] = str(SCRIPT.parents[2])  # the tests' own modules

    import torch
    from transformers import AutoModelForCausalLM

    from ptuning.config import TuningArguments
    from ptuning.data.batch import RowDataset
    from ptuning.families.chatglm2.template import ChatGLM2Template
    from ptuning.kernels import TORCH, swap
    from ptuning.methods import PrefixMethod
    from ptuning.methods.prefix.attach import prefix_of
    from ptuning.training.trainer import TuningTrainer
    from tests.conftest import REPO
    from tests.training.test_trainer import Tokenizer, some_rows

    file, tokens, loss_average = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rows = sorted(some_rows(24), key=lambda row: len(row.input_ids))
    # The first process gets the short rows, the second the long ones.
    rows = [row for at in (0, 4, 8) for row in (*rows[at : at + 4], *rows[at + 12 : at + 16])]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(REPO / "tests" / "golden" / "chatglm2-tiny", dtype=torch.float32)
    PrefixMethod(8, prefix_dropout=0.0).start(model)
    swap(model, TORCH)
    args = TuningArguments(
        output_dir=f"{file}-out",
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        loss_average=loss_average,
        train_sampling_strategy="sequential",
    )
    trainer = TuningTrainer(
        model=model,
        args=args,
        method=None,
        template=ChatGLM2Template(Tokenizer()),
        manifest=None,
        train_dataset=RowDataset(rows),
        micro_batch_tokens=tokens,
    )
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, given: calls.append(1))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"prefix": prefix_of(model).embedding.weight.detach(), "losses": losses, "calls": len(calls)}
    torch.save(found, f"{file}-{args.process_index}.pt")
    torch.distributed.destroy_process_group()
