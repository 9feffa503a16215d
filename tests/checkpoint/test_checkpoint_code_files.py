"""A tuned model's folder names official code only where it has it, and programs without this package then load it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning.checkpoint.code_files import carry_code
from ptuning.checkpoint.model_folder import save_model_folder

CODE = {
    "configuration_chatglm.py": """
from transformers import PretrainedConfig
class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"
""",
    "quantization.py": "BITS = 4\n",
    "modeling_chatglm.py": """
import torch
from transformers import PreTrainedModel
from .configuration_chatglm import ChatGLMConfig
from .quantization import BITS
class ChatGLMForConditionalGeneration(PreTrainedModel):
    config_class = ChatGLMConfig
    def __init__(self, config):
        super().__init__(config)
        self.transformer = torch.nn.Module()
        self.transformer.output_layer = torch.nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()
""",
    "tokenization_chatglm.py": "class ChatGLMTokenizer: pass\n",
}
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained(sys.argv[1], **{"trust_remote_code": True})
model = AutoModel.from_pretrained(sys.argv[1], config=config, **{"trust_remote_code": True})
assert "ptuning" not in sys.modules and "transformers_modules" in type(model).__module__, type(model)
torch.save(model.transformer.output_layer.weight.detach(), sys.argv[2])
"""


@pytest.fixture
def saved(tmp_path, golden_dir, tiny_tokenizer):
    """files of code beside the base → the folder of the model tuned from it"""

    def save(*code):
        base, folder = tmp_path / "base", tmp_path / "tuned"
        shutil.copytree(golden_dir / "chatglm2-tiny", base)
        tiny_tokenizer.save_pretrained(base)
        for name in code:
            (base / name).write_text(CODE[name], encoding="utf-8")
        (base / "my_own_script.py").write_text("")
        folder.mkdir()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        save_model_folder(model, tokenizer, None, folder, writes=True, device=torch.device("cpu"))
        return folder

    return save


def auto_maps(folder):
    names = ("config.json", "tokenizer_config.json")
    return [json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") for name in names]


def test_no_names_without_files(saved):
    folder = saved()
    assert auto_maps(folder) == [None, None]
    assert not list(folder.glob("*.py"))
    AutoModelForCausalLM.from_pretrained(folder)


def test_only_the_names_whose_files_are_there(saved):
    model, tokenizer = auto_maps(saved("configuration_chatglm.py"))
    assert model == {"AutoConfig": "configuration_chatglm.ChatGLMConfig"} and tokenizer is None


def test_the_code_goes_along_and_loads_it(saved, tmp_path):
    folder = saved(*CODE)
    assert {path.name for path in folder.glob("*.py")} == set(CODE)
    model, tokenizer = auto_maps(folder)
    assert model["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
    assert tokenizer == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "weight.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(torch.load(tmp_path / "weight.pt", weights_only=True), ours)


def test_a_base_that_is_gone_leaves_no_names(saved, tmp_path):
    folder = saved(*CODE)
    for file in folder.glob("*.py"):
        file.unlink()
    carry_code(tmp_path / "gone", folder)
    assert auto_maps(folder) == [None, None]
