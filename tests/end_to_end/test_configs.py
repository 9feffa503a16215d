"""Every shipped configuration runs: one step on the small model, with the repo's own data in the shape it asks for."""

import pytest
import yaml

from ptuning.checkpoint.manifest import read_manifest
from tests.end_to_end.conftest import MODEL, ROOT

CONFIGS = sorted((ROOT / "configs").glob("ptuning_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_step(path, run_main, tmp_path):
    columns = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = ROOT / "data" / ("dialogue" if "history_column" in columns else "advertise")
    small = (
        f"--max_steps 1 --max_train_samples 16 --max_eval_samples 2 --max_predict_samples 2 --output_dir {tmp_path}/run"
    )
    files = f"--model_name_or_path {MODEL} --train_file {data}/train.json --validation_file {data}/dev.json"
    done = run_main("--config", path, *files.split(), *small.split())
    assert "effective batch 16" in done.stdout
    assert read_manifest(tmp_path / "run").settings == {"pre_seq_len": 128, "prefix_projection": False}
