"""How much of each private image a recovered picture shows: more than one that needs no attack?"""

import math
from collections.abc import Mapping
from typing import Any

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from gipip.evaluation.metrics import evaluate
from gipip.evaluation.references import references
from gipip.evaluation.statistics import bootstrap_interval, paired_difference

Batch = Float[Tensor, "_ channels height width"]

LEVELS = {
    "nothing": "no closer than its mean colour",
    "colour": "closer than its mean colour: colours and light",
    "outline": "closer than its own 4×4 thumbnail: outlines, an object may be guessed",
    "content": "closer than its own 8×8 thumbnail: a person may tell what is on it",
}
"""How much of an image is recovered, from least to most. "Closer": SSIM is better, and
PSNR or LPIPS, too; PSNR alone flatters blur, LPIPS alone noise.
"""

METRICS = ("identified", "psnr", "ssim", "lpips")
_LINES = {"colour": "mean colour", "outline": "4×4 thumbnail", "content": "8×8 thumbnail"}
_IMAGE = ["batch", "image"]
_FINEST = 2**22  # pixels of all candidates together, for the memory of LPIPS


def recovery(
    found: Mapping[tuple[str, str, int], Batch], truths: Mapping[int, Batch], others: Batch
) -> pandas.DataFrame:
    """A row for each private image, attack and reference: as `evaluate`, and its `level`.

    `found`: pictures by condition, arm and batch; `truths`: private images by batch.
    References are arms of the condition "". `others`: images of the kind, of which the
    first thousand are the candidates among which a picture identifies its own, and the
    mean is a reference.
    """
    others = others[:1000]
    room = max(_FINEST // others[0, 0].numel(), sum(map(len, truths.values())))
    pool = torch.cat([*truths.values(), others])[:room]
    pictures = {}
    for batch, truth in truths.items():
        for arm, images in references(truth, others.mean(dim=0)).items():
            pictures["", arm, batch] = images
    frames = []
    for (condition, arm, batch), images in (pictures | {**found}).items():
        frames.append(evaluate(images, truths[batch], pool=pool))
        frames[-1] = frames[-1].assign(condition=condition, arm=arm, batch=batch)
    return _with_levels(pandas.concat(frames, ignore_index=True))


def _with_levels(frame: pandas.DataFrame) -> pandas.DataFrame:
    level = pandas.Series("nothing", frame.index)
    for name, arm in _LINES.items():
        line = frame[_IMAGE].merge(frame[frame["arm"] == arm], how="left")  # its own image's
        closer = frame["ssim"] > line["ssim"]
        closer &= (frame["psnr"] > line["psnr"]) | (frame["lpips"] < line["lpips"])
        level[closer] = name
    return frame.assign(level=pandas.Categorical(level, list(LEVELS), ordered=True))


def summary(part: pandas.DataFrame) -> dict[str, Any]:
    """Of an arm's rows: means with intervals over batches, as [mean, low, high], and
    how many images reach each level.
    """
    table: dict[str, Any] = {"images": len(part)}
    for name in METRICS:
        if part[name].notna().all():
            interval = bootstrap_interval(part[name], groups=part["batch"])[:3]
            table[name] = [None if math.isnan(value) else float(value) for value in interval]
    return table | {"levels": part["level"].value_counts(sort=False).to_dict()}


def linkable(part: pandas.DataFrame, frame: pandas.DataFrame) -> bool:
    """Whether an arm's pictures identify images more often than their mean colours do,
    by a 95 % interval over batches.
    """
    pairs = part.merge(frame[frame["arm"] == "mean colour"], on=_IMAGE, suffixes=("", "_line"))
    if pairs["identified"].isna().any():
        return False
    above = paired_difference(pairs["identified"], pairs["identified_line"], groups=pairs["batch"])
    return above.low > 0
