"""The commands and snippets of README and docs, run as they stand on a run of their own."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import BIN, ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]

TRANSLATED = sorted((ROOT / "docs").glob("*.zh.md"))


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [(page.name, code) for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


def ptuning_commands() -> list[str]:
    """The `.venv/bin/ptuning` command lines that are complete (no `…`)."""
    lines = []
    for _, code in blocks("bash"):
        joined = code.replace("\\\n", " ")
        lines += [line.split("  #")[0].strip() for line in joined.splitlines() if line.startswith(".venv/bin/ptuning")]
    return sorted({line for line in lines if "…" not in line and " train " not in line})


def code_without_comments(page: Path) -> list[tuple[str, str]]:
    """Language and code of each block. What may be translated is left out: comments, and what a command prints (text)."""
    found = re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [(kind, "" if kind == "text" else re.sub(r"[ \t]*(?<!\S)#.*", "", code)) for kind, code in found]


@pytest.mark.parametrize("name", [page.name.removesuffix(".zh.md") for page in TRANSLATED])
def test_both_languages_have_the_same_commands(name):
    english, chinese = (next(page for page in PAGES if page.name == name + end) for end in (".md", ".zh.md"))
    assert code_without_comments(chinese) == code_without_comments(english)
    for page, other in ((english, chinese), (chinese, english)):
        assert f"]({other.name})" in page.read_text(encoding="utf-8").split("\n## ")[0]
    links = [
        re.findall(r"\]\(([^)#]+?)(?:\.zh)?(?:\.md)?(?:#[^)]*)?\)", page.read_text("utf-8"))
        for page in (english, chinese)
    ]
    assert sorted(links[0]) == sorted(links[1])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A directory that looks like the repo after the first command: output/demo, models/, data/."""
    folder = tmp_path_factory.mktemp("repo")
    for name in ("models", "data", "configs"):
        (folder / name).symlink_to(ROOT / name)
    # without warmup, whose first step has rate 0 and would leave a LoRA without effect
    small = "--warmup_steps 0 --max_steps 1 --max_predict_samples 1 --max_eval_samples 1 --max_target_length 16"
    for name in ("ptuning_demo", "lora_demo"):
        command = [BIN / "python", "-m", "ptuning.main", "--config", f"configs/{name}.yaml", *small.split()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    return folder


def test_there_is_something_to_run():
    assert len(blocks("python")) >= 3
    assert len(ptuning_commands()) >= 3


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_snippets(page, code, finished_run):
    if "output/demo-peft" in code and not (finished_run / "output" / "demo-peft").exists():
        run(
            ".venv/bin/ptuning export --ptuning_checkpoint output/demo --format peft --output_dir output/demo-peft",
            finished_run,
        )
    done = subprocess.run([BIN / "python", "-c", code], cwd=finished_run, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{page}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("command", ptuning_commands())
def test_commands(command, finished_run):
    target = re.search(r"--output_dir (\S+)", command)
    if target and (finished_run / target[1]).exists():
        pytest.skip("already run by another test of this module")
    done = run(command, finished_run)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def run(command: str, folder) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    small = ["--max_predict_samples", "1"] if words[1] == "evaluate" else []
    return subprocess.run(
        [str(BIN / "ptuning"), *words[1:], *small],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=600,
        input="/exit\n",
    )
