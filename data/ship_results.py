"""Pack results of a store into one file that ships: `data/study/NAME.safetensors`.

    python data/ship_results.py results data/study/02_inversion.safetensors \\
        --where model=resnet18 batch_size=1 --iterations 300

takes those on private images whose scenario has the given values, and whose attack ran so long.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from gipip.experiments.scenario import Scenario
from gipip.experiments.shipped import ship
from gipip.files import read_tensors


def matching(store: Path, scenario: dict, iterations: int) -> Iterator[Path]:
    for path in sorted(store.glob("*.safetensors")):
        config = read_tensors(path)[1]["config"]
        about = {name: config["scenario"][name] for name in scenario}
        if about == scenario and config["attack"]["iterations"] == iterations:
            yield path


def _value(text: str) -> tuple[str, object]:
    """A field and its value, as JSON or else as it stands."""
    name, _, value = text.partition("=")
    if name not in Scenario.model_fields:
        known = ", ".join(Scenario.model_fields)
        raise argparse.ArgumentTypeError(f"a scenario has no {name!r}, only {known}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("store", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--where", nargs="+", type=_value, default=[], metavar="FIELD=VALUE")
    parser.add_argument("--iterations", type=int, required=True)
    asked = parser.parse_args()
    wanted = {"pool": "private", **dict(asked.where)}
    chosen = list(matching(asked.store, wanted, asked.iterations))
    print(f"{len(chosen)} results: {ship(chosen, asked.target)}")


if __name__ == "__main__":
    main()
