"""Started by torchrun: FOLDER RESULT. Loads a GLM-130B folder divided among the processes, and writes what it computes."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

import ptuning.families  # noqa: E402, F401
from tests.tiny_glm130b import GOLDEN  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto")).eval()
expected, found = load_file(GOLDEN / "expected.safetensors"), {}
for kind in ("gmask", "mask"):
    ids = expected[f"{kind}.input_ids"]
    with torch.no_grad():
        found[f"{kind}.logits"] = model(ids).logits
    rule = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found[f"{kind}.greedy"] = model.generate(ids[:, :13], **rule)[0, 13:].contiguous()
matrix = model.transformer.layers[0].mlp.dense_h_to_4h.weight
found["share"] = torch.tensor((getattr(matrix, "_local_tensor", matrix)).numel() / matrix.numel())
if dist.get_rank() == 0:
    save_file(found, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
