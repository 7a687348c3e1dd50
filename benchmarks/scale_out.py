"""What a second worker is worth: the throughput of a sweep with two workers, as a share
of twice that with one.

python benchmarks/scale_out.py                                # about eight minutes on a
quiet machine with two cores
    python benchmarks/scale_out.py --runs 4 --iterations 20 --repetitions 1      # does it work at all?

Both do the same runs from an empty store; they take turns, in the other order each
time. The start of the cluster and a first short run on every worker (which imports
PyTorch and loads data) are timed apart. Writes benchmarks/results/scale_out.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import distributed

import gipip
from gipip.experiments import sweep as experiments
from gipip.experiments.cluster import open_cluster

TARGET = 0.9
RESULT = Path(__file__).parent / "results" / "scale_out.json"


def attacks(count: int, iterations: int, model: str, batch_size: int) -> list[gipip.Run]:
    attack = gipip.InvertingGradients(iterations=iterations)
    return [
        gipip.Run("IG", gipip.Scenario(model=model, batch_size=batch_size, seed=seed), attack)
        for seed in range(count)
    ]


def measure(workers: int, runs: list[gipip.Run]) -> dict[str, float]:
    """Seconds that the cluster's start and the runs take with so many workers, and
    seconds of all runs within their workers.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with open_cluster(workers, scheduler=None, runs=len(runs)) as client:
            warm_up(client, runs[0])
            ready = time.perf_counter()
            results = gipip.sweep(runs, store=folder, scheduler=client.scheduler.address)
            done = time.perf_counter()
    return {
        "start": ready - started,
        "runs": done - ready,
        "inside": sum(result.details["seconds"] for result in results),
    }


def warm_up(client: distributed.Client, run: gipip.Run) -> None:
    """One iteration, without a store, on every worker at once."""
    short = gipip.Run(run.arm, run.scenario, run.attack.model_copy(update={"iterations": 1}))
    addresses = client.scheduler_info()["workers"]
    client.gather(
        [
            client.submit(
                experiments._work, short, None, float("inf"), workers=[address], pure=False
            )
            for address in addresses
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=8,
        help="attacks in a sweep (8); even, so that two workers can share them",
    )
    parser.add_argument(
        "--iterations", type=int, default=400, help="of each attack (400: about 10 seconds)"
    )
    parser.add_argument("--repetitions", type=int, default=4, help="of both measurements (4)")
    parser.add_argument("--model", default="convnet16")
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    runs = attacks(arguments.runs, arguments.iterations, arguments.model, arguments.batch_size)
    measured = []
    for repetition in range(arguments.repetitions):
        order = (1, 2) if repetition % 2 == 0 else (2, 1)
        seconds = {workers: measure(workers, runs) for workers in order}
        efficiency = seconds[1]["runs"] / (2 * seconds[2]["runs"])
        measured.append(
            {"efficiency": efficiency, "one worker": seconds[1], "two workers": seconds[2]}
        )
        print(
            f"{repetition + 1}: one {seconds[1]['runs']:.1f} s, two {seconds[2]['runs']:.1f} s, efficiency {efficiency:.3f}",
            flush=True,
        )
    efficiencies = [repetition["efficiency"] for repetition in measured]
    summary = {
        "minimum": min(efficiencies),
        "median": statistics.median(efficiencies),
        "maximum": max(efficiencies),
    }
    made = experiments.provenance()
    made["machine"] += f", {os.cpu_count()} cores, {platform.system()}"
    made["versions"] |= {"dask": distributed.__version__, "gipip": gipip.__version__}
    report = {
        "efficiency": summary,
        "target": TARGET,
        "settings": vars(arguments),
        "repetitions": measured,
        **made,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"Two workers do {summary['median']:.1%} of twice one worker's work (target {TARGET:.0%}): {RESULT}"
    )


if __name__ == "__main__":
    main()
