"""What a second worker is worth: the throughput of a sweep with two workers, as a share
of twice that with one.

    python benchmarks/scale_out.py     # about eight minutes on a quiet machine with two cores
    python benchmarks/scale_out.py --runs 4 --iterations 20 --repetitions 1      # does it work?

Both do the same runs from an empty store; they take turns, in the other order each
time. The start of the processes and a first short run on every one (which imports
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

import gipip
from gipip.experiments.pool import Processes
from gipip.experiments.sweep import provenance

TARGET = 0.9
RESULT = Path(__file__).parent / "results" / "scale_out.json"


def attacks(count: int, iterations: int, model: str, batch_size: int) -> list[gipip.Run]:
    """The runs of a sweep."""
    attack = gipip.InvertingGradients(iterations=iterations)
    return [
        gipip.Run("IG", gipip.Scenario(model=model, batch_size=batch_size, seed=seed), attack)
        for seed in range(count)
    ]


def warm_up(run: gipip.Run) -> None:
    """One iteration, without a store."""
    short = run.attack.model_copy(update={"iterations": 1})
    gipip.execute(gipip.Run(run.arm, run.scenario, short))


def measure(workers: int, runs: list[gipip.Run]) -> dict[str, float]:
    """Seconds that the processes' start and the runs take with so many workers, and
    seconds of all runs within their workers.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Processes(workers) as pool:
        list(pool.map(warm_up, runs[:workers]))
        ready = time.perf_counter()
        results = gipip.sweep(runs, store=folder, executor=pool)
        done = time.perf_counter()
    inside = sum(result.details["seconds"] for result in results)
    return {"start": ready - started, "runs": done - ready, "inside": inside}


def repetition(number: int, runs: list[gipip.Run]) -> dict:
    """Both measured once."""
    order = (1, 2) if number % 2 else (2, 1)
    measured = {workers: measure(workers, runs) for workers in order}
    one, two = measured[1], measured[2]
    efficiency = one["runs"] / (2 * two["runs"])
    seconds = f"one {one['runs']:.1f} s, two {two['runs']:.1f} s"
    print(f"{number}: {seconds}, efficiency {efficiency:.3f}", flush=True)
    return {"efficiency": efficiency, "one worker": one, "two workers": two}


def settings() -> argparse.Namespace:
    """Of the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--runs", type=int, default=8, help="attacks in a sweep (8); even")
    parser.add_argument(
        "--iterations", type=int, default=400, help="of an attack (400: about 10 s)"
    )
    parser.add_argument("--repetitions", type=int, default=4, help="of both measurements (4)")
    parser.add_argument("--model", default="convnet16")
    parser.add_argument("--batch-size", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    asked = settings()
    runs = attacks(asked.runs, asked.iterations, asked.model, asked.batch_size)
    measured = [repetition(number + 1, runs) for number in range(asked.repetitions)]
    found = [each["efficiency"] for each in measured]
    median = statistics.median(found)
    made = provenance()
    made["machine"] += f", {os.cpu_count()} cores, {platform.system()}"
    made["versions"] |= {"gipip": gipip.__version__}
    report = {
        "efficiency": {"minimum": min(found), "median": median, "maximum": max(found)},
        "target": TARGET,
        "settings": vars(asked),
        "repetitions": measured,
        **made,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    share = f"Two workers do {median:.1%} of twice one worker's work"
    print(f"{share} (target {TARGET:.0%}): {RESULT}")


if __name__ == "__main__":
    main()
