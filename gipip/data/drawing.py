"""Draws without global random state: images are sorted by the SHA-256 of "purpose:seed:name"."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from jaxtyping import Int64
from torch import Tensor

Labels = Int64[Tensor, "images"]


def stratified_rows(labels: Labels, names: Sequence, salt: str) -> list[int]:
    """All rows, shuffled as `salt` says, so that every beginning holds each class in proportion."""
    classes = labels.tolist()
    sizes = Counter(classes)
    places = {row: (rank + 0.5) / sizes[classes[row]] for rank, row in _ranked(labels, names, salt)}
    return sorted(places, key=lambda row: places[row])


def batches(
    labels: Labels, names: Sequence, size: int, distinct_labels: bool, salt: str
) -> list[list[int]]:
    """One pass over all rows, cut into batches; with `distinct_labels` no class twice in one."""
    ranked = _ranked(labels, names, salt)
    rounds: dict[int, list[int]] = {}
    for rank, row in ranked:
        rounds.setdefault(rank if distinct_labels else 0, []).append(row)
    found = []
    for rows in rounds.values():
        starts = range(0, len(rows) - size + 1, size)
        found += [rows[start : start + size] for start in starts]
    return found


def _ranked(labels: Labels, names: Sequence, salt: str) -> list[tuple[int, int]]:
    """(rank within its class, row) of every image, in the order that `salt` determines."""

    def digest(row: int) -> bytes:
        text = f"{salt}:{names[row]}"  # a file's name may hold bytes that are no text
        return hashlib.sha256(text.encode(errors="surrogateescape")).digest()

    seen: Counter[int] = Counter()
    ranked, classes = [], labels.tolist()
    for row in sorted(range(len(names)), key=digest):
        ranked.append((seen[classes[row]], row))
        seen[classes[row]] += 1
    return ranked
