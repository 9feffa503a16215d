"""A process that doesn't answer is named."""

import subprocess
import textwrap

import pytest

SCRIPT = """
    import sys
    from datetime import timedelta
    import torch.distributed as dist
    from ptuning.errors import TrainingError
    from ptuning.distributed import wait_for_all_ranks

    rank, port, absent = map(int, sys.argv[1:])
    store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    if rank == absent:
        dist.new_group(backend="gloo")
        sys.stdin.read()  # alive, but never at the barrier
    try:
        wait_for_all_ranks(timedelta(seconds=3))
        print("all here")
    except TrainingError as error:
        print(error)
"""


@pytest.mark.parametrize("absent", [-1, 2])
def test_the_missing_rank_is_named(free_port, absent, warm_bin):
    processes = [
        subprocess.Popen(
            [warm_bin / "python", "-c", textwrap.dedent(SCRIPT), str(rank), str(free_port), str(absent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    first = processes[0].communicate(timeout=600)[0]
    for process in processes[1:]:
        process.kill()
        process.communicate()
    if absent < 0:
        assert "all here" in first
    else:
        assert "not all 3 processes answered within 3 s (--ddp_timeout)" in first
        assert "2" in first.split("(--ddp_timeout):")[1].split("Look at")[0]
