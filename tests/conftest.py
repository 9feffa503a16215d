"""Fixtures shared by all tests: the golden figures, tiny models, and tokenizers.

The environment is set before torch is imported. The golden figures were computed by AVX2 kernels, with which this package's
logits are equal to the last bit; AVX-512 kernels differ by 2.4e-6.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import socket
import tempfile

os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # also of the processes that tests start: there are two workers on two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PTUNING_LANG"] = "en"  # whatever this machine speaks
# Folders that all workers share: the first process makes them, so that nothing is there from an earlier state of the code,
# and takes them away, and no other one that imports this file.
os.environ["PTUNING_TESTS"] = os.environ.get("PTUNING_TESTS") or tempfile.mkdtemp(
    prefix=f"ptuning-tests-{os.getpid()}-"
)
os.environ["HF_DATASETS_CACHE"] = os.environ["PTUNING_TESTS"] + "/cache"

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import warm

if TYPE_CHECKING:  # imported where they are used: the process that only divides the tests needs none of them
    import torch

    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
    from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

WORKER = "PYTEST_XDIST_WORKER" in os.environ
SHARED_FOLDER = Path(os.environ["PTUNING_TESTS"])
WARM_BIN = SHARED_FOLDER / "bin"
WARM_BIN.mkdir(exist_ok=True)
if SHARED_FOLDER.name.startswith(f"ptuning-tests-{os.getpid()}-"):
    atexit.register(shutil.rmtree, SHARED_FOLDER, ignore_errors=True)

# Without the last four, Chromium asks Google's servers at every start.
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"  # other people's files: used in place where present, never part of the project
WARM = pytest.StashKey[ExitStack]()
PREFIX_KEY = "transformer.prefix_encoder."

# What the tiny vocabulary is learned from. "sop" is frequent, so that it becomes an ordinary piece, also inside a word.
CORPUS = [
    "[Round 1]\n\n问：你好\n\n答：你好，很高兴见到你。",
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约",
    "这件外套简约而不简单，白色的衣身十分百搭，彰显别样时尚。",
    "sop sop 你sop好sop世sop界sop shop sops the quick brown fox jumps over the lazy dog 0123456789",
    "  leading and  double  spaces \t and tabs",
    "问题 1 的答案是 2，问题 3 的答案是 4！？；：“”",
]


def pytest_sessionstart(session: pytest.Session) -> None:
    """With several workers: one server of warm Pythons for all, and one that has collected the tests, from which they fork."""
    if session.config.getoption("numprocesses", None) and not WORKER:
        session.config.stash[WARM] = ExitStack()
        session.config.stash[WARM].enter_context(warm.start(WARM_BIN, tuple(session.config.args)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list) -> None:
    """Workers fork from the server that has collected the tests; what is on another machine or asks for a Python doesn't."""
    warm.wait(WARM_BIN / warm.WORKERS)
    for spec in specs:
        if spec.popen and not spec.python:
            spec.python = str(WARM_BIN / warm.WORKERS / "python")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if WARM in session.config.stash:
        session.config.stash[WARM].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker ends alone with them: each takes the next file (scripts/test.sh)."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.parent.name == "end_to_end"}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector needn't walk through it, as accelerate has it do after each run."""
    import torch

    torch.set_num_threads(1)  # tiny models on a shared machine: measured 1.9 s instead of 64 s for the golden logits
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """tests/golden: weights and figures computed with the official implementation."""
    return REPO / "tests" / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir) -> dict[str, torch.Tensor]:
    """The golden tensors; read only."""
    from safetensors.torch import load_file

    return load_file(golden_dir / "expected.safetensors")


@pytest.fixture(scope="session")
def load_tiny(golden_dir) -> Callable[..., ChatGLMForConditionalGeneration]:
    """Loads a fresh golden model in eval mode: `load_tiny()` is the base, `load_tiny("embedding")` and
    `load_tiny("projection")` carry the golden prefix; `attention` picks the implementation."""
    import torch
    from transformers import AutoModelForCausalLM

    from ptuning.methods.prefix.attach import attach_prefix

    def load(prefix: str | None = None, attention: str = "sdpa", **kwargs) -> ChatGLMForConditionalGeneration:
        folder = golden_dir / "chatglm2-tiny"
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **kwargs)
        if prefix is not None:
            encoder = attach_prefix(model, 8, prefix_projection=prefix == "projection")
            saved = torch.load(golden_dir / f"prefix-{prefix}" / "pytorch_model.bin", weights_only=True)
            encoder.load_state_dict({key.removeprefix(PREFIX_KEY): tensor for key, tensor in saved.items()})
        return model.eval()

    return load


@pytest.fixture(scope="session")
def real_tokenizer() -> ChatGLMTokenizer:
    """The real ChatGLM2-6B tokenizer, where this machine has it."""
    from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

    path = SHARED / "chatglm2" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the real tokenizer is not part of the project")
    return ChatGLMTokenizer(str(path))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> ChatGLMTokenizer:
    """A ChatGLM2 tokenizer over a vocabulary of 500 pieces, trained here: BPE, byte fallback, text kept as it is."""
    import sentencepiece

    from ptuning.families.chatglm2.tokenizer import ChatGLMTokenizer

    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line for text in CORPUS for line in text.split("\n") * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def warm_bin() -> Iterator[Path]:
    """The folder with `python`, `ptuning`, `torchrun`, … that start fast: `WARM_BIN`."""
    with nullcontext() if WORKER else warm.start(WARM_BIN):
        warm.wait(WARM_BIN)
        yield WARM_BIN


@pytest.fixture
def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, headless. Not for the session: while playwright is open no other test of this process can run an
    asyncio loop."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS.split())
        yield launched
        launched.close()
