"""Five minutes of everything that clients do to a server, and what it must come out of: prints one JSON line last.

    python benchmarks/proof.py [--seconds 300] [--clients 64]

A real server process on the small model with three prefixes and two LoRAs. The clients ask greedily (streamed or not), read
slowly, go away in the middle, send half a request or none that can be answered; beside them a LoRA and a prefix are added, asked
and removed over and over. Each whole answer must be the one that the engine gives to the same question alone. Then all places
must be free, and SIGTERM comes while answers run: each of them is whole, or a 503, and the process ends with status 0. Memory is
flat when the medians of the last two thirds differ by less than --most_growth MiB. The exit status is 1 where something isn't so.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import TINY, stamp
from benchmarks.serve import resident, server
from ptuning.checkpoint.manifest import describe
from ptuning.config.options import ModelArguments
from ptuning.families.chatglm2.template import build_prompt
from ptuning.generation import Engine, GenerationRequest
from ptuning.methods import SaveTarget, detach, method_of
from ptuning.serving.models import LoadedModel

ADMIN = "admin-key-of-the-proof"
TUNED = {
    "ads": {"method": "prefix", "pre_seq_len": 8},
    "talk": {"method": "prefix", "pre_seq_len": 24},
    "proj": {"method": "prefix", "pre_seq_len": 5, "prefix_projection": True},
    "low": {"method": "lora"},
    "thin": {"method": "lora", "lora_rank": 2, "use_rslora": True},
}
ADDED = {"late-prefix": "talk", "late-lora": "thin"}  # a further name, and what it is the same as
QUESTIONS = ("你好", "再见", "类型#上衣*材质#牛仔布*颜色#白色", "1", "请介绍一下自己。" * 8, "类型#裙*风格#简约" * 4)
LENGTHS = (4, 12, 32)
CHAT = "/v1/chat/completions"
EXPECTED = {"200", "400", "404"} | {
    f"{word} SIGTERM" for word in ("200 before", "200 after", "503 after", "refused after")
}
KINDS = {"whole": 5, "stream": 5, "slow": 2, "leave": 3, "half": 1, "bad": 1}  # how often, against each other


@dataclass
class Tally:
    """What has happened so far."""

    expected: dict[tuple[str, str, int], str]
    statuses: collections.Counter = field(default_factory=collections.Counter)
    kinds: collections.Counter = field(default_factory=collections.Counter)
    mismatches: list[str] = field(default_factory=list)
    equal: int = 0

    def compare(self, model: str, question: str, length: int, text: str) -> None:
        wanted = self.expected[ADDED.get(model, model), question, length]
        if text == wanted:
            self.equal += 1
        else:
            self.mismatches.append(f"{model}, {question!r}, {length} tokens: {text!r}, alone {wanted!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="--max_concurrent of the server")
    parser.add_argument("--most_growth", type=int, default=24, help="MiB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loaded = LoadedModel.load(str(TINY), say=lambda text: None)
        tuned = {name: save(loaded, Path(folder) / name, seed) for seed, name in enumerate(TUNED)}
        tally = Tally(alone(loaded, tuned))
        os.environ["PTUNING_ADMIN_KEY"] = ADMIN
        with server(TINY, tuned, "continuous", args.rows) as (url, process):
            memory = asyncio.run(load(url, process.pid, tuned, tally, args))
            free = places_free(url)
            asyncio.run(stopped(url, process, tally))
            status = process.wait(60)
    third = len(memory) // 3
    before, after = (round(statistics.median(part)) for part in (memory[third : 2 * third], memory[2 * third :]))
    strange = set(tally.statuses) - EXPECTED
    good = not (tally.mismatches or strange) and free and status == 0 and after - before < args.most_growth
    good = good and tally.statuses["200 after SIGTERM"] > 0
    for text in tally.mismatches[:5]:
        print(f"mismatch: {text}")
    summary = stamp("proof") | {
        "seconds": args.seconds,
        "clients": args.clients,
        "requests": dict(sorted(tally.kinds.items())),
        "statuses": dict(sorted(tally.statuses.items())),
        "equal": tally.equal,
        "mismatches": len(tally.mismatches),
        "different_answers": len(set(tally.expected.values())),
        "memory_mib": [before, after],
        "places_free": free,
        "exit_status": status,
        "good": good,
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0 if good else 1


# --- what is served, and what it answers alone --------------------------------------------------------------------------


def save(loaded: LoadedModel, folder: Path, seed: int) -> Path:
    """A random prefix or LoRA, as training saves them, strong enough to change greedy answers."""
    method = method_of(ModelArguments(str(TINY), **TUNED[folder.name]), trains=True)
    torch.manual_seed(seed)
    method.start(loaded.model)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 3 / parameter.shape[-1])
            elif parameter.requires_grad:
                parameter.mul_(4)
    target = SaveTarget(folder, True, torch.device("cpu"))
    method.save(loaded.model, None, describe(TINY, method.name, method.settings()), target)
    detach(loaded.model)
    return folder


def alone(loaded: LoadedModel, tuned: dict[str, Path]) -> dict[tuple[str, str, int], str]:
    """Each model's greedy answer to each question, one after the other, nothing kept in between."""
    answers, template = {}, loaded.template
    for name in ("base", *tuned):
        prefix = loaded.read_prefix(name, tuned[name]).prefix if name in tuned else None
        for question in QUESTIONS:
            ids = [*template.begin_ids, *template.encode_text([build_prompt(question)])[0]]
            with Engine(loaded.model, template.stop_ids) as engine:
                tokens = engine.submit([GenerationRequest(0, ids, max(LENGTHS), prefix=prefix)])
                made = [token.token for token in tokens if token.token is not None]
            for length in LENGTHS:
                answers[name, question, length] = template.decode(made[:length]).strip()
    return answers


# --- the load -----------------------------------------------------------------------------------------------------------


async def load(url: str, pid: int, tuned: dict[str, Path], tally: Tally, args: argparse.Namespace) -> list[int]:
    """Everything at once, for so many seconds. Returns the server's memory, in MiB, over time."""
    end, memory = time.monotonic() + args.seconds, []

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            while time.monotonic() < end:
                kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
                tally.kinds[kind] += 1
                await one(http, kind, draw.choice(("base", *tuned)), draw, tally)
                await asyncio.sleep(draw.expovariate(20))

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident(pid))
            await asyncio.sleep(min(1.0, args.seconds / 40))

    await asyncio.gather(watch(), administrator(url, tuned, tally, end), *map(client, range(args.clients)))
    return memory


async def one(http: httpx.AsyncClient, kind: str, model: str, draw: random.Random, tally: Tally) -> None:
    """One request of a client, of one kind."""
    question, length = draw.choice(QUESTIONS), draw.choice(LENGTHS)
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": length}
    if kind == "half":
        await half(str(http.base_url), draw)
    elif kind == "bad":
        broken = draw.choice(({"temperature": "hot"}, {"messages": []}, {"model": "nobody"}, {"max_tokens": -1}))
        tally.statuses[str((await http.post(CHAT, json=body | broken)).status_code)] += 1
    elif kind == "leave":
        try:
            async with asyncio.timeout(draw.random() * 0.5):
                await http.post(CHAT, json=body | {"stream": draw.random() < 0.5})
        except TimeoutError:
            return
    elif kind == "whole":
        whole = await http.post(CHAT, json=body)
        tally.statuses[str(whole.status_code)] += 1
        if whole.status_code == 200:
            tally.compare(model, question, length, whole.json()["choices"][0]["message"]["content"])
    else:
        status, text = await streamed(http, body, draw.random() * 0.2 if kind == "slow" else 0.0)
        tally.statuses[status] += 1
        if status == "200":
            tally.compare(model, question, length, text)


async def streamed(http: httpx.AsyncClient, body: dict, pause: float) -> tuple[str, str]:
    """Status and text of a streamed answer, read with a pause after each piece; the status is "cut" where it didn't end."""
    text, ended = "", False
    async with http.stream("POST", CHAT, json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return str(answer.status_code), ""
        async for line in answer.aiter_lines():
            if line.startswith('data: {"error"'):
                return str(json.loads(line[6:])["error"]["code"]), text
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                await asyncio.sleep(pause)
            ended = ended or line == "data: [DONE]"
    return "200" if ended else "cut", text


async def half(url: str, draw: random.Random) -> None:
    """A request that breaks off, and the connection with it."""
    address = urlsplit(url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = b"POST /chatglm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    writer.write(head[: draw.randrange(len(head) + 1)])
    await asyncio.sleep(draw.random())
    writer.close()


async def administrator(url: str, tuned: dict[str, Path], tally: Tally, end: float) -> None:
    """Adds, asks and removes, over and over."""
    draw = random.Random(-1)
    async with httpx.AsyncClient(base_url=url, timeout=300, headers={"Authorization": f"Bearer {ADMIN}"}) as http:
        while time.monotonic() < end:
            for name, same in ADDED.items():
                added = await http.post("/v1/prefixes", json={"name": name, "path": str(tuned[same])})
                await asyncio.gather(*(one(http, kind, name, draw, tally) for kind in ("whole", "stream")))
                removed = await http.delete(f"/v1/prefixes/{name}")
                tally.statuses.update([str(added.status_code), str(removed.status_code)])
                tally.kinds.update(["add", "remove", "whole", "stream"])
                await one(http, "whole", name, draw, tally)  # a 404 now
            await asyncio.sleep(0.2)


# --- the end ------------------------------------------------------------------------------------------------------------


def places_free(url: str, seconds: float = 60.0) -> bool:
    """Whether nothing runs or waits any more, once those who went away have been noticed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if httpx.get(f"{url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}:
            return True
        time.sleep(0.1)
    return False


async def stopped(url: str, process: subprocess.Popen, tally: Tally) -> None:
    """SIGTERM while answers run: each is whole or refused."""
    length, ended = max(LENGTHS), []

    async def ask(number: int) -> None:
        draw = random.Random(number)
        question = draw.choice(QUESTIONS)
        message = {"role": "user", "content": question}
        await asyncio.sleep(draw.random() * 0.5)
        body = {"model": "base", "messages": [message], "temperature": 0, "max_tokens": length}
        try:
            status, text = await streamed(http, body, 0.0)
        except httpx.TransportError:  # it has ended
            status, text = "refused", ""
        tally.statuses[f"{status} {'after' if ended else 'before'} SIGTERM"] += 1
        if status == "200":
            tally.compare("base", question, length, text)

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        asked = asyncio.gather(*map(ask, range(60)))
        while not asked.done() and (await http.get("/health")).json()["running"] < 8:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        ended.append(True)
        await asked


if __name__ == "__main__":
    raise SystemExit(main())
