"""The most memory an attack takes, whole and in chunks: ResNet18, 64 images of 64×64,
two iterations.

    python benchmarks/memory.py                                 # about ten minutes on two cores
    python benchmarks/memory.py --batch-size 4 --chunks 0 1     # does it work at all?

Each attack runs in a process of its own; what the process held before the attack is
subtracted. Adds to benchmarks/results/memory.json.
"""

import argparse
import dataclasses
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import torch
from reports import machine, write_rows

import gipip
from gipip.progress import quiet


def measure(batch_size: int, size: int, chunk_size: int, engine: str, threads: int) -> dict:
    """Peak of the resident memory beyond that of the process before, in GiB, and
    seconds an iteration.
    """
    torch.set_num_threads(threads)
    model = gipip.build_model("resnet18", num_classes=1000, image_size=size)
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    update = gipip.Client(model).share(
        gipip.LabeledImages(images, torch.zeros(1, dtype=torch.long))
    )  # of one image, to take no memory
    update = dataclasses.replace(update, batch_size=batch_size, labels=torch.arange(batch_size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with quiet():
        attack = gipip.InvertingGradients(iterations=2)
        seconds = (
            attack(model, update, engine=engine, chunk_size=chunk_size or None).seconds / 3
        )  # and one more look at the cost
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    about = {
        "batch size": batch_size,
        "image size": size,
        "chunk size": chunk_size or batch_size,
        "engine": engine,
    }
    return about | {"peak GiB": (peak - before) / 2**20, "seconds an iteration": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[0, 16, 4],
        help="images at a time; 0: all (default 0 16 4)",
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    cases = [("traced", chunk) for chunk in arguments.chunks] + [("eager", 0)]
    rows = []
    for engine, chunk in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(
                measure,
                arguments.batch_size,
                arguments.image_size,
                chunk,
                engine,
                arguments.threads,
            ).result()
        rows.append({"model": "resnet18", **found, **machine(threads=arguments.threads)})
        took = f"{found['peak GiB']:.2f} GiB, {found['seconds an iteration']:.1f} s"
        print(f"{engine}, {found['chunk size']} at a time: {took}", flush=True)
    write_rows(
        "memory",
        rows,
        keys=("model", "batch size", "image size", "chunk size", "engine", "machine"),
    )


if __name__ == "__main__":
    main()
