"""pyproject.toml is the only source of what gipip needs, and the other files agree with it."""

import ast
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rattler import MatchSpec, Version, VersionSpec

import gipip
from gipip.federation.defenses import AnyDefense

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "distributed": "dask"}
"""Of modules that are not called like the package that brings them."""


@pytest.mark.parametrize(
    "version", ["3.10.19", "3.11.0", "3.11.9", "3.12.4", "3.13.7", "3.14.0", "3.15.1", "4.0.0"]
)
def test_conda_and_pip_accept_the_same_pythons(version):
    python = MatchSpec(
        next(entry for entry in CONDA["dependencies"] if str(entry).startswith("python "))
    )
    assert VersionSpec(python.version).matches(Version(version)) == (
        version in SpecifierSet(PROJECT["requires-python"])
    )


def test_conda_leaves_every_other_requirement_to_pyproject():
    names = [
        entry if isinstance(entry, dict) else MatchSpec(entry).name.normalized
        for entry in CONDA["dependencies"]
    ]
    assert names == ["python", "pip", {"pip": ["-e .[test]"]}]
    assert "test" in PROJECT["optional-dependencies"]


def test_every_imported_package_is_declared():
    declared = {Requirement(text).name for text in PROJECT["dependencies"]}
    imported = {
        DISTRIBUTION.get(module, module)
        for path in (ROOT / "gipip").rglob("*.py")
        for module in _imports(path)
    }
    assert imported - declared == set()


def test_every_declared_package_has_a_lower_bound():
    requirements = [
        Requirement(text)
        for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    ]
    assert [
        requirement.name for requirement in requirements if ">=" not in str(requirement.specifier)
    ] == []


def test_everything_exported_is_there_and_what_is_imported_is_exported_in_order():
    tree = ast.parse((ROOT / "gipip" / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert gipip.__all__ == sorted(imported)
    assert all(hasattr(gipip, name) for name in gipip.__all__)


def test_every_attack_and_defence_and_what_loads_and_trains_priors_is_exported():
    defences = {kind.__name__ for kind in get_args(get_args(AnyDefense)[0])}
    assert {*gipip.ATTACKS, *defences, *gipip.priors.__all__} - {"Generator"} <= set(gipip.__all__)


def _imports(path: Path) -> set[str]:
    """Top-level names of the third-party modules that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"gipip"}
