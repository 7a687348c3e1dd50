"""Draws `cifar10-sample.safetensors` from the full CIFAR-10: the same tensors and
metadata, bit for bit.

Run `gipip data cifar10` first, then `python data/draw_cifar10_sample.py [target]`.
"""

import sys
from pathlib import Path

from gipip.data.datasets import CIFAR10_SAMPLE, PAPER_FRACTION, load_dataset, named_tensors
from gipip.files import write_tensors

PRIVATE_IMAGES = 256
METADATA = {
    "title": "Sample of CIFAR-10: 1,900 auxiliary images (training split), "
    "200 tuning and 256 private images (test split)",
    "source": "https://www.cs.toronto.edu/~kriz/cifar.html, binary version, "
    "SHA-256 of its six batches "
    "013ba16d14ecc4829da62bf2af648ca30f600491ecb3e7f329c827db0dd17522",
    "citation": "Alex Krizhevsky. Learning Multiple Layers of Features from Tiny Images. "
    "Technical report, University of Toronto, 2009.",
    "licence": "None stated by the authors; free for research, who ask that the technical report "
    "is cited.",
    "drawn": "Each class in proportion, in the order of SHA-256(purpose:0:index), by "
    "data/draw_cifar10_sample.py; seed 0.",
    "contents": "<pool>_images: uint8, NCHW, as in the source. <pool>_labels: 0 (airplane) to 9 "
    "(truck). <pool>_indices: place in split.",
}


def draw(target: Path) -> Path:
    full = load_dataset("cifar10", full=True)
    private = full.private_pool[full.private_pool.shuffled("private:0")[:PRIVATE_IMAGES]]
    auxiliary = full.auxiliary(PAPER_FRACTION, seed=0)
    tensors = named_tensors(auxiliary=auxiliary, tuning=full.tuning_pool, private=private)
    return write_tensors(target, tensors, METADATA)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else CIFAR10_SAMPLE))
