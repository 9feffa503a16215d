"""Two machines, for real: two network namespaces with a cable between them, one process in each, nothing else shared but files.

The namespaces, their names and their addresses exist only while a test runs.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.end_to_end.conftest import BIN, ROOT, losses

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29500  # free, because nobody else is in these namespaces

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Host:
    """One namespace: run commands with `prefix` in front; `device` is its end of the cable."""

    name: str
    device: str
    address: str

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.name]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts on one network of their own."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing (apt-get install iproute2)")
    tag = uuid.uuid4().hex[:6]
    made = [Host(f"ptuning-{tag}-{i}", f"pt{tag}{i}", address) for i, address in enumerate(ADDRESSES)]
    try:
        for host in made:
            ip("netns", "add", host.name)
        # Both ends are made inside a namespace, so that the machine's own network never sees them.
        first, second = made
        ip("-n", first.name, "link", "add", first.device, "type", "veth", "peer", second.device, "netns", second.name)
        for host in made:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.name, "link", "set", host.device, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        subprocess.run([*first.prefix, "true"], check=True, capture_output=True, text=True)
        yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces aren't allowed here: {' '.join(error.cmd)}: {error.stderr.strip()}")
    finally:
        for host in made:
            subprocess.run(
                ["ip", "netns", "delete", host.name], capture_output=True
            )  # its end of the cable goes with it


def start(host: Host, rank: int, flags: list[str], *launcher: str) -> subprocess.Popen:
    """torchrun on one host, as docs/distributed.md says."""
    network = {"GLOO_SOCKET_IFNAME": host.device, "TP_SOCKET_IFNAME": host.device, "OMP_NUM_THREADS": "1"}
    command = [
        *host.prefix,
        str(BIN / "torchrun"),
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--node-rank={rank}",
        f"--master-addr={ADDRESSES[0]}",
        f"--master-port={PORT}",
        *launcher,
        str(ROOT / "ptuning" / "main.py"),
        *flags,
    ]
    env = os.environ | network | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(command, cwd="/", env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(processes: list[subprocess.Popen], timeout: float) -> list[str]:
    """Waits for all and returns what they printed; kills those that this test started if it fails."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def test_two_hosts_train_as_one_process(hosts, tmp_path, train_flags, run_main):
    same = {"max_steps": 3, "train_sampling_strategy": "sequential", "prefix_dropout": 0, "save_strategy": "no"}
    run_main(*train_flags(tmp_path / "one", per_device_train_batch_size=8, **same))
    same["deepspeed"] = ROOT / "configs" / "zero3.json"
    flags = train_flags(tmp_path / "two", per_device_train_batch_size=4, **same)
    processes = [start(host, rank, flags) for rank, host in enumerate(hosts)]
    printed = finish(processes, timeout=600)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-2000:] for text in printed)
    assert "effective batch 8 = 4 rows × 1 accumulation steps × 2 processes" in printed[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_the_hosts_talk_over_the_cable_only(hosts):
    """The fixture is what it says: each host reaches the other, and nothing of this machine's own network."""
    for host, other in zip(hosts, reversed(hosts), strict=True):
        routes = subprocess.run([*host.prefix, "ip", "route"], capture_output=True, text=True, check=True).stdout
        assert [line.split()[0] for line in routes.splitlines()] == ["10.213.77.0/24"]
        code = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('{other.address}', 9))"
        subprocess.run([*host.prefix, sys.executable, "-c", code], check=True)


def test_a_host_that_never_comes_ends_the_wait(hosts, tmp_path, train_flags):
    """The first host waits a finite time, then says how many came."""
    flags = train_flags(tmp_path / "out", ddp_timeout=5)
    process = start(hosts[0], 0, flags, "--rdzv-conf=timeout=5,join_timeout=5")
    (printed,) = finish([process], timeout=300)  # half of torch's own patience
    assert process.returncode not in (0, None)
    assert "1/2 clients joined" in printed, printed[-3000:]
