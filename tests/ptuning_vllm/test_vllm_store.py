"""What a worker reads prefixes with."""

import pytest
import torch
from safetensors.torch import save_file

from ptuning.methods.store import store_prefix
from ptuning_vllm.store import BadPrefix, Prefixes, own_groups, read


def stored(folder, length=4, seed=0):
    torch.manual_seed(seed)
    keys, values = torch.randn(2, 3, length, 2, 8).unbind(0)
    return store_prefix(keys, values, folder).prefix, keys, values


def test_what_this_package_writes(tmp_path):
    digest, keys, values = stored(tmp_path)
    found = read(tmp_path, digest)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)


def test_the_ones_used_last_are_kept(tmp_path):
    reads = []

    def share(whole):
        reads.append(whole)
        return whole.to(torch.bfloat16)

    prefixes, digests = Prefixes(tmp_path, 2, share), [stored(tmp_path, seed=seed)[0] for seed in range(3)]
    for place in (0, 1, 0, 0, 2, 0):  # 2 takes the place of 1
        assert prefixes.get(digests[place], 4)[0].dtype == torch.bfloat16
    assert (len(reads), len(prefixes)) == (2 * 3, 2)
    (tmp_path / f"{digests[0]}.safetensors").unlink()
    prefixes.get(digests[0], 4)
    prefixes.get(digests[1], 4)
    assert len(reads) == 2 * 4


def test_bad_ones_are_told(tmp_path):
    digest, keys, values = stored(tmp_path)
    prefixes = Prefixes(tmp_path, 2, lambda whole: whole)
    with pytest.raises(BadPrefix, match="has 4 positions, and the request says 5"):
        prefixes.get(digest, 5)
    for name in ("", "../secret", "x" * 32, digest.upper(), digest + "\n"):
        with pytest.raises(BadPrefix, match="not those of a prefix"):
            read(tmp_path, name)
    with pytest.raises(BadPrefix, match=r"can't be read .FileNotFoundError"):
        read(tmp_path, "0" * 32)
    path = tmp_path / f"{digest}.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadPrefix, match=r"can't be read .SafetensorError"):
        read(tmp_path, digest)
    save_file({"keys": keys}, path)
    with pytest.raises(BadPrefix, match=r"can't be read .KeyError: 'values'"):
        read(tmp_path, digest)
    save_file({"keys": keys, "values": values + 1}, path)
    with pytest.raises(BadPrefix, match="its content is not what its name says"):
        read(tmp_path, digest)
    save_file({"keys": keys.half(), "values": values}, path)
    with pytest.raises(BadPrefix, match="float16"):
        read(tmp_path, digest)


@pytest.mark.parametrize(
    ("groups", "size", "own", "expected"),
    [
        (2, 1, 2, [(0, 2)]),
        (2, 2, 1, [(0, 1), (1, 2)]),
        (2, 4, 1, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (8, 2, 4, [(0, 4), (4, 8)]),
    ],
)
def test_groups_of_a_worker(groups, size, own, expected):
    found = [own_groups(groups, rank, size, own) for rank in range(size)]
    assert [(part.start, part.stop) for part in found] == expected
