"""Draws without global random state: images are sorted by the SHA-256 of
"purpose:seed:name".
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence


def stratified_rows(labels: Sequence[int], names: Sequence[str | int], salt: str) -> list[int]:
    """All rows, shuffled as `salt` says, so that every beginning holds each class in
    proportion.
    """
    sizes = Counter(labels)
    ranked = _ranked(labels, names, salt)
    places = {row: (rank + 0.5) / sizes[labels[row]] for rank, row in ranked}
    return sorted(places, key=places.__getitem__)


def batches(
    labels: Sequence[int], names: Sequence[str | int], size: int, distinct: bool, salt: str
) -> list[list[int]]:
    """One pass over all rows, cut into batches; if `distinct`, no class comes twice in
    one.
    """
    rounds: dict[int, list[int]] = {}
    for rank, row in _ranked(labels, names, salt):
        rounds.setdefault(rank if distinct else 0, []).append(row)
    found = []
    for rows in rounds.values():
        starts = range(0, len(rows) - size + 1, size)
        found += [rows[start : start + size] for start in starts]
    return found


def _ranked(
    labels: Sequence[int], names: Sequence[str | int], salt: str
) -> Iterator[tuple[int, int]]:
    """(rank within its class, row) of every image, in the order that `salt` determines."""

    def digest(row: int) -> bytes:
        text = f"{salt}:{names[row]}"  # a file's name may hold bytes that are no text
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    seen: Counter[int] = Counter()
    for row in sorted(range(len(names)), key=digest):
        yield seen[labels[row]], row
        seen[labels[row]] += 1
