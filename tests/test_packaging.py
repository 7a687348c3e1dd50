"""pyproject.toml is the only source of what gipip needs, and the other files agree with it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image
from rattler import MatchSpec, Version, VersionSpec

import gipip
from gipip.federation.defenses import AnyDefense

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
MODULES = {"pillow": {"PIL"}, "pyyaml": {"yaml"}, "dask": {"dask", "distributed"}}
"""Of packages whose modules are not called like them."""
NEEDS = {  # the files that need an extra
    "figures.py": "notebooks",
    "explorer.py": "notebooks",
    "reproduce.py": "notebooks",
    "experiments/show.py": "notebooks",
    "evaluation/statistics.py": "notebooks",
    "federation/defenses.py": "dp",
    "data/photographs.py": "imagenet",
}


@pytest.mark.parametrize(
    "version", ["3.10.19", "3.11.0", "3.11.9", "3.12.4", "3.13.7", "3.14.0", "3.15.1", "4.0.0"]
)
def test_conda_and_pip_accept_the_same_pythons(version):
    [text] = [entry for entry in CONDA["dependencies"] if str(entry).startswith("python ")]
    by_conda = VersionSpec(MatchSpec(text).version).matches(Version(version))
    assert by_conda == (version in SpecifierSet(PROJECT["requires-python"]))


def test_conda_leaves_every_other_requirement_to_pyproject():
    entries = CONDA["dependencies"]
    names = [
        each if isinstance(each, dict) else MatchSpec(each).name.normalized for each in entries
    ]
    assert names == ["python", "pip", {"pip": ["-e .[test]"]}]


def test_the_environment_of_make_and_conda_holds_every_extra():
    def included(extra):
        own = [Requirement(text) for text in EXTRAS[extra] if text.startswith("gipip[")]
        return {extra}.union(*(included(part) for each in own for part in each.extras))

    assert included("test") == set(EXTRAS)
    assert "--editable '.[test]'" in (ROOT / "Makefile").read_text()


def modules_of(requirements: list[str]) -> set[str]:
    """The modules of packages that are required."""
    names = {Requirement(text).name for text in requirements} - {"gipip"}
    return set().union(*(MODULES.get(name, {name.replace("-", "_")}) for name in names))


@pytest.mark.parametrize("path", sorted((ROOT / "gipip").rglob("*.py")), ids=lambda path: path.stem)
def test_a_file_imports_what_the_core_or_its_extra_installs(path):
    name = path.relative_to(ROOT / "gipip").as_posix()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {module.split(".")[0] for module in plain | froms}
    known = {"gipip", *sys.stdlib_module_names, *modules_of(CORE)}
    assert imported - known <= modules_of(EXTRAS[NEEDS[name]] if name in NEEDS else [])


def declared() -> list[Requirement]:
    """All packages that the core and the extras name."""
    texts = CORE + [text for texts in EXTRAS.values() for text in texts]
    return [Requirement(text) for text in texts if not text.startswith("gipip[")]


def test_every_declared_package_has_a_lower_bound():
    assert [str(each) for each in declared() if ">=" not in str(each.specifier)] == []


def test_the_versions_behind_the_numbers_are_exact_and_in_the_declared_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for each in declared():
        assert exact.get(each.name, "none") in each.specifier, each
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text()


def test_the_citation_agrees_with_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for field in ("version", "license", "keywords", "authors"):
        assert citation[field] == PROJECT[field]
    paper = citation["preferred-citation"]
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    authors = [f"{each['given-names']} {each['family-names']}" for each in paper["authors"]]
    assert f"{', '.join(authors)}. *{paper['title']}*" in readme


def test_the_changelog_speaks_of_this_version():
    assert gipip.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        ".github/workflows/ci.yml",
        ".pre-commit-config.yaml",
        ".devcontainer/devcontainer.json",
        "Dockerfile",
        "CONTRIBUTING.md",
    ],
)
def test_a_file_that_calls_make_names_targets_that_exist(name):
    called = re.findall(
        r"(?:run: |entry: |RUN .*|postCreateCommand\": \"|`)make ([a-z-]+)",
        (ROOT / name).read_text(),
    )
    assert called and set(called) <= set(TARGETS)


def run(
    script: str, *options: str, path: Sequence[Path] = (ROOT,), folder: Path | None = None
) -> str:
    """What a script prints in a process of its own, in `folder`, that imports from `path`."""
    done = subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def distributions(requirements: list[str]) -> dict[str, Distribution]:
    """What pip installs for them, with all that they need themselves."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        each = waiting.pop()
        wanted = each.marker is None or each.marker.evaluate({"extra": ""})
        if wanted and each.name not in found:
            found[each.name] = distribution(each.name)
            waiting += [Requirement(text) for text in found[each.name].requires or ()]
    return found


@pytest.fixture
def core(tmp_path):
    """A folder of links to all that pip installs for the core, and to nothing else."""
    for each in distributions(CORE).values():
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            link = tmp_path / top
            if not link.exists():
                link.symlink_to(each.locate_file(top))
    return tmp_path


def test_an_attack_in_a_script_needs_the_core_only(core):
    script = """
import importlib.util
import gipip
batch = gipip.load_dataset("cifar10").private(batch_size=2)
model = gipip.build_model("lenet", num_classes=10)
attack = gipip.GIPIP(prior=gipip.load_prior(), iterations=2)
print(len(gipip.evaluate(attack(model, gipip.Client(model).share(batch)), batch)))
print(importlib.util.find_spec("matplotlib"))
"""
    assert run(script, "-S", path=[core, ROOT]) == "2\nNone\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with what would be published: the wheel, what it holds in "unpacked", the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder


@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_what_is_published_is_smaller_than_20_megabytes(built, kind):
    [file] = built.glob(f"*.{kind}")
    assert file.stat().st_size < 20_000_000


def test_a_wheel_attacks_a_picture_with_the_core_alone(built, core, tmp_path):
    Image.new("RGB", (40, 50), "teal").save(tmp_path / "photo.png")
    script = """
from gipip.cli import app
for attack, size in (("gipip", 32), ("gipip", 64), ("latent", 32), ("latent", 64)):
    options = f"photo.png --attack {attack} --size {size} --model lenet --iterations 1"
    app(["attack", *options.split()], standalone_mode=False)
"""
    run(script, "-S", path=[core, built / "unpacked"], folder=tmp_path)
    assert len(list(tmp_path.glob("results/attack/*/1.png"))) == 4


def test_a_wheel_has_the_quickstart_and_says_where_the_other_notebooks_are(built, tmp_path):
    script = "from gipip.reproduce import plan; print(list(plan('smoke'))); plan('cpu')"
    unpacked = [built / "unpacked"]
    with pytest.raises(AssertionError, match="all are in its repository.*00_quickstart"):
        run(script, path=unpacked, folder=tmp_path)
    assert [path.name for path in tmp_path.glob("notebooks/*.ipynb")] == ["00_quickstart.ipynb"]


def test_the_attack_of_the_contributors_page_is_one_new_file(built, core, tmp_path):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    attack, export = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    package = shutil.copytree(built / "unpacked" / "gipip", tmp_path / "gipip")
    [name] = re.findall(r"Write `gipip/(.*?)`", page)
    (package / name).write_text(attack)
    with (package / "__init__.pyi").open("a") as stub:
        stub.write(export)
    script = "import gipip; print(gipip.SmoothInversion is gipip.ATTACKS['smooth'])"
    assert run(script, "-S", path=[core], folder=tmp_path) == "True\n"


def test_importing_gipip_loads_a_library_only_when_a_name_is_asked_for():
    loaded = "print(sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert run(f"import sys, gipip; {loaded}") == "[]\n"
    assert "torch" in run(f"import sys, gipip; gipip.Client; {loaded}")


def test_every_name_exported_is_there_and_no_other_one():
    assert all(hasattr(gipip, name) for name in gipip.__all__)
    assert set(gipip.__all__) <= set(dir(gipip))
    assert not hasattr(gipip, "invert")


def test_type_checkers_see_the_names_that_are_exported():
    stub = ast.parse((ROOT / "gipip" / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    assert sorted(alias.asname or "" for alias in aliases) == gipip.__all__
    assert (ROOT / "gipip" / "py.typed").exists()


def test_every_attack_and_defence_and_what_loads_and_trains_priors_is_exported():
    attacks = {kind.__name__ for kind in gipip.ATTACKS.values()}
    defences = {kind.__name__ for kind in get_args(get_args(AnyDefense)[0])}
    priors = {
        "load_prior",
        "load_generator",
        "train_autoencoder",
        "train_generator",
        "train_decoder",
    }
    assert attacks | defences | priors <= set(gipip.__all__)
