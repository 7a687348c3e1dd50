"""The run-time check of gipip's signatures, which conftest.py installs for the tests."""

from typing import Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int is a float (PEP 484). jaxtyping decorates method by method, where beartype
# cannot know what Self is.
checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: object}))
)
