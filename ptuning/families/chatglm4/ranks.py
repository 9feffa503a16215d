"""A tiktoken vocabulary: a line each for the bytes of a token, in base64, and its rank, which is its id."""

import base64
from pathlib import Path

from ptuning.errors import ModelError


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token → rank, in the order of the ranks.

    Raises:
        ModelError: a line that is none, ranks that don't count from 0, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            shown = line[:40].decode(errors="replace")
            raise _damaged(f"{path}:{number}", f"{shown!r} isn't a token in base64 and its rank") from None
    for index, found in enumerate(sorted(ranks.values())):
        if found != index:
            raise _damaged(
                path, f"the ranks don't count from 0 to {len(ranks) - 1}: {found} stands in the place of {index}"
            )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise _damaged(path, f"there is no token for the byte {byte}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _damaged(where: str | Path, what: str) -> ModelError:
    return ModelError(f"{where}: {what}; copy tokenizer.model again from the official model.")
