"""--fold_projection: a run with a projection leaves a plain prefix that computes the same."""

import pytest
import torch

from ptuning.checkpoint.manifest import read_manifest
from ptuning.families import read_config
from ptuning.main import main
from ptuning.methods.prefix.attach import attach_prefix, detach_prefix
from ptuning.methods.prefix.checkpoint import materialise
from ptuning.methods.prefix.encoder import PrefixShape
from ptuning.methods.prefix.read import read_prefix
from ptuning.runs import RunFolder
from tests.conftest import REPO
from tests.methods.test_lora import logits


def test_a_folded_prefix_gives_the_same_logits(load_tiny):
    model = load_tiny()
    encoder = attach_prefix(model, 6, prefix_projection=True).eval()
    expected = logits(model)
    plain = encoder.folded()
    detach_prefix(model)
    model = load_tiny()
    attach_prefix(model, 6).load_state_dict(plain.state_dict())
    assert torch.equal(logits(model.eval()), expected)


def test_a_run_saves_the_plain_prefix_and_its_checkpoints_the_projection(tmp_path, capsys):
    flags = ["--do_train", "--model_name_or_path", REPO / "models" / "chatglm2-tiny", "--report_to", "none"]
    flags += ["--train_file", REPO / "data" / "advertise" / "train.json", "--max_train_samples", 4, "--max_steps", 2]
    flags += ["--prompt_column", "content", "--response_column", "summary", "--per_device_train_batch_size", 2]
    flags += ["--pre_seq_len", 4, "--save_steps", 2, "--output_dir", tmp_path / "run", "--fold_projection"]
    assert main([str(flag) for flag in flags]) == 2
    assert "--fold_projection is for --prefix_projection true" in capsys.readouterr().err
    assert main([str(flag) for flag in [*flags, "--prefix_projection", "true"]]) == 0
    tuned, before = read_prefix(tmp_path / "run"), read_prefix(tmp_path / "run" / "checkpoint-2")
    assert (tuned.prefix_projection, before.prefix_projection) == (False, True)
    assert read_manifest(tmp_path / "run").settings == {"pre_seq_len": 4, "prefix_projection": False}
    assert torch.equal(materialise(tuned), materialise(before))
    shape = PrefixShape.of(read_config(REPO / "models" / "chatglm2-tiny"))
    projection = 2 * shape.width * shape.hidden_size + shape.width + shape.hidden_size
    assert RunFolder(tmp_path / "run").latest_record()["trained"] == 4 * shape.width + projection


def test_there_is_nothing_to_fold_without_a_projection(load_tiny):
    encoder = attach_prefix(load_tiny(), 3)
    assert torch.equal(encoder.folded().embedding.weight, encoder.embedding.weight)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_dropout_stays(load_tiny, dropout):
    encoder = attach_prefix(load_tiny(), 3, prefix_projection=True)
    encoder.dropout.p = dropout
    assert encoder.folded().dropout.p == dropout
