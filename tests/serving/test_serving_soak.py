"""Mixed load with flat memory: seconds by default, SOAK_SECONDS=600 for the ten minutes of the issue."""

import asyncio
import json
import os
import random
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import PREFIXES, running

SECONDS = float(os.environ.get("SOAK_SECONDS", "12"))


def resident() -> int:
    """Bytes of this process that are in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat_under_mixed_load(prefix_folders):
    chance, readings, counts = random.Random(0), [], {}
    with running(prefix_folders, max_concurrent=8, max_queue=8, batch_tokens=8192) as server:

        async def client(end):
            async with httpx.AsyncClient(timeout=300) as http:
                while time.monotonic() < end:
                    kind = chance.choice(["chat", "stream", "rest", "leave", "bad"])
                    content = {
                        "model": chance.choice(["base", *PREFIXES]),
                        "messages": [{"role": "user", "content": "你好" * chance.randrange(1, 120)}],
                        "max_tokens": chance.randrange(1, 40),
                        "stream": kind == "stream",
                        "logprobs": chance.random() < 0.3,
                    }
                    path = "/v1/chat/completions"
                    if kind == "rest":
                        path, content = "/chatglm", {"prompt": "你好", "history": [["1", "2"]], "max_length": 100}
                    elif kind == "bad":
                        content["temperature"] = "hot"
                    try:
                        posted = http.post(server.url + path, json=content)
                        status = (await asyncio.wait_for(posted, 0.05 if kind == "leave" else 60)).status_code
                    except TimeoutError:
                        status = "left"
                    counts[status] = counts.get(status, 0) + 1

        async def load():
            begin = time.monotonic()
            clients = asyncio.gather(*(client(begin + SECONDS) for _ in range(12)))
            while not clients.done():
                await asyncio.wait([clients], timeout=SECONDS / 40)
                readings.append(resident())
            await clients

        asyncio.run(load())
        assert server.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    # The first third is for warming up: allocator, caches of pydantic and torch, the engine's batch.
    later = readings[len(readings) // 3 :]
    half = len(later) // 2
    before, after = sorted(later[:half])[half // 2], sorted(later[half:])[half // 2]
    print(json.dumps({"seconds": SECONDS, "requests": sum(counts.values()), "statuses": {str(k): v for k, v in counts.items()},
                      "before_mib": before >> 20, "after_mib": after >> 20}))  # fmt: skip
    assert after - before < 24 << 20, readings
    assert set(counts) <= {200, 400, 429, "left"} and counts[200] > SECONDS
