"""MinHash signatures by a library, and the rows that share a band of them: candidates for a true comparison."""

# N rows, K values of a signature

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.errors import ConfigError

# 21 bands of 6 values: a pair of similarity s becomes a candidate with probability 1 - (1 - s^6)^21, which is 0.998 at
# 0.8 (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4).
VALUES, BAND = 128, 6
BANDS = VALUES // BAND
SEED = 1
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F,
                 0xE7037ED1A0B428DB], np.uint64)  # fmt: skip


def library() -> str:
    """The library that makes signatures: rensa, or else datasketch. Raises ConfigError if neither is installed."""
    for name in ("rensa", "datasketch"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise ConfigError(
        "--deep compares rows by MinHash, and neither rensa nor datasketch is installed: pip install 'jaxft[deep]'"
    )


def signatures_of(sets: Sequence[set[str]], name: str) -> np.ndarray:
    """The signature of each set, uint32 [N, K]. name: of the library."""
    ordered = [sorted(one) for one in sets]
    if name == "rensa":
        from rensa import RMinHash

        digests: Any = RMinHash.digests_from_token_sets(ordered, num_perm=VALUES, seed=SEED)
        return np.array(digests, np.uint32).reshape(len(sets), VALUES)
    from datasketch import MinHash

    encoded = [[gram.encode("utf-8", "surrogatepass") for gram in one] for one in ordered]
    hashes = [one.hashvalues for one in MinHash.generator(encoded, num_perm=VALUES, seed=SEED)]
    return np.array(hashes, np.uint64).astype(np.uint32).reshape(len(sets), VALUES)


def empty_signatures(rows: int) -> np.ndarray:
    """Room for the signatures of rows, uint32 [N, K], in a file without a name that goes with the array."""
    if not rows:
        return np.zeros((0, VALUES), np.uint32)
    return np.memmap(tempfile.TemporaryFile(), np.uint32, "w+", shape=(rows, VALUES))


def buckets(signatures_NK: np.ndarray, rows: np.ndarray, extra: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """The rows that share a band, by band: arrays of two or more of the indices `rows`, in ascending order.

    extra: uint64, by row; rows with other values of it are in other buckets. A pair may come several times.
    """
    for band in range(BANDS):
        columns = np.asarray(signatures_NK[rows, band * BAND : (band + 1) * BAND], np.uint64)
        keys = np.zeros(len(rows), np.uint64) if extra is None else extra[rows].copy()
        for column, odd in zip(columns.T, _ODD, strict=True):
            keys = (keys ^ column) * odd
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, edges):
            if len(bucket) > 1:
                yield np.sort(rows[bucket])
