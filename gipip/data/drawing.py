"""Draws without global random state: images are sorted by the SHA-256 of
"purpose:seed:name".
"""

import hashlib
from collections.abc import Sequence


def stratified_rows(labels: Sequence[int], names: Sequence[str | int], salt: str) -> list[int]:
    """All rows, shuffled as `salt` says, so that every beginning holds each class in
    proportion.
    """
    classes = _classes(labels, names, salt)
    places = (classes.cumcount() + 0.5) / classes.transform("size")
    return places.sort_values(kind="stable").index.tolist()


def batches(
    labels: Sequence[int], names: Sequence[str | int], size: int, distinct: bool, salt: str
) -> list[list[int]]:
    """One pass over all rows, cut into batches; if `distinct`, no class comes twice in
    one.
    """
    rank = _classes(labels, names, salt).cumcount()
    found = []
    for _, rows in rank.groupby(rank if distinct else rank * 0):
        starts = range(0, len(rows) - size + 1, size)
        found += [rows.index[start : start + size].tolist() for start in starts]
    return found


def _classes(labels: Sequence[int], names: Sequence[str | int], salt: str):
    """The labels in the order that `salt` determines, grouped."""
    import pandas  # takes a third of a second to import

    # a file's name may hold bytes that are no text
    texts = (f"{salt}:{name}".encode(errors="surrogateescape") for name in names)
    digests = [hashlib.sha256(text).digest() for text in texts]
    order = sorted(range(len(names)), key=digests.__getitem__)
    shuffled = pandas.Series(labels, dtype=int).iloc[order]
    return shuffled.groupby(shuffled)
