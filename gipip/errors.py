"""Errors a user can act on: each message says what was wrong, what was expected and
what to do.
"""


class GipipError(Exception):
    """Base class of every error that gipip raises on purpose."""


class DataError(GipipError):
    """A data set is missing, incomplete, or not what it should be."""


class BatchSizeError(GipipError):
    """A batch of the requested size cannot be drawn, or does not fit the update."""


class LabelError(GipipError):
    """A label is out of range, or labels cannot be inferred."""


class ModelError(GipipError):
    """The client's model is not one that gipip can attack."""


class UpdateError(GipipError):
    """A shared update is unusable: not finite, or from another model."""


class EngineError(GipipError):
    """An engine that cannot run here, or not for this attack."""


class DefenseError(GipipError):
    """A defence lacks what it needs, or cannot be applied to the update."""


class DamagedFileError(GipipError):
    """A file does not hold what was written to it."""


class StoreError(GipipError):
    """The result store cannot be read or written."""


class SweepError(GipipError):
    """Some runs of a sweep failed; the others are stored."""


class OutOfTime(GipipError):
    """The time given was over before all was done. What is done is kept, and the same
    call goes on from there.
    """


class ProfileError(GipipError):
    """An unknown profile, notebook or notebook parameter."""
