"""How long a sweep will probably take: said before it begins."""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from gipip.errors import DamagedFileError
from gipip.files import read_metadata

_WORTH_TIMING = 2_000  # iterations of a kind above which the first few are timed, if the store holds no result of that kind


def expected_time(
    configs: Mapping[str, dict],
    store: Path,
    machine: str,
    workers: int,
    measure: Callable[[list[str]], Mapping[str, float]],
) -> str:
    """How many runs there are to compute and how long that will probably take, by the
    seconds that iterations of their kind took before.

    `configs`: of the runs, by key. `store`: the folder of results on this `machine`,
    with attacks under way in "unfinished". `measure`: gives the seconds of an iteration
    of runs, by key; it is asked for one of each kind that takes long and was not timed
    before.
    """
    speeds, steps, kinds = (
        _speeds(store, machine),
        defaultdict(int),
        {key: _kind(config) for key, config in configs.items()},
    )
    for key, config in configs.items():
        begun = sum(
            about["steps"] for about in _metadata(store.glob(f"unfinished/{key}*.safetensors"))
        )
        steps[kinds[key]] += max(0, _steps(config) - begun)
    first = {kind: key for key, kind in reversed(kinds.items())}
    new = [
        first[kind]
        for kind, number in steps.items()
        if kind not in speeds and number > _WORTH_TIMING
    ]
    speeds |= {kinds[key]: seconds for key, seconds in measure(new).items()}
    seconds = sum(speeds.get(kind, 0) * number for kind, number in steps.items()) / min(
        max(workers, 1), len(configs)
    )
    unknown = sum(kind not in speeds for kind in kinds.values())
    if unknown == len(configs):
        return f"attacks: {unknown} to compute, of kinds not timed here before"
    more = f", and the time of {unknown} of kinds not timed here before" if unknown else ""
    return f"attacks: {len(configs)} to compute, about {_duration(seconds)} with {workers} {'worker' if workers == 1 else 'workers'}{more}"


def _kind(config: dict) -> tuple:
    """What the time of an iteration depends on, the machine apart."""
    return config["attack"]["name"], *(
        str(config["scenario"][name])
        for name in ("dataset", "model", "batch_size", "mode", "fedavg")
    )


def _steps(config: dict) -> int:
    """Iterations of all restarts and of GIAS's two stages."""
    attack = config["attack"]
    return attack["restarts"] * (
        attack["iterations"] + attack.get("latent_restarts", 0) * attack.get("latent_iterations", 0)
    )


def _speeds(store: Path, machine: str) -> dict[tuple, float]:
    """The median seconds of an iteration for every kind of run of which the store holds
    results from this machine.
    """
    found = defaultdict(list)
    for about in _metadata(store.glob("*.safetensors")):
        if "config" in about and about["made"]["machine"] == machine:
            found[_kind(about["config"])].append(about["seconds"] / _steps(about["config"]))
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


def _metadata(paths: Iterable[Path]) -> Iterator[dict]:
    for path in paths:
        with contextlib.suppress(DamagedFileError):
            yield read_metadata(path)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} seconds"
        if seconds < 100
        else f"{seconds / 60:.0f} minutes"
        if seconds < 6000
        else f"{seconds / 3600:.1f} hours"
    )
