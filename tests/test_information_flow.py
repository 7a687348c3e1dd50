"""What an attacker may see: the model, the shared update and its prior. Held against
the import graph of the source.
"""

import ast
import re
from pathlib import Path

import pytest

import gipip

PACKAGE = Path(gipip.__file__).parent
ATTACKER = sorted(path for room in ("attacks", "priors") for path in (PACKAGE / room).rglob("*.py"))
ALLOWED = {
    "attacks": {"attacks", "errors", "federation", "files", "priors", "progress"},
    # data: of auxiliary images; federation: the client's model, which the attacker knows
    "priors": {"data", "errors", "federation", "files", "priors", "progress"},
}
GROUND_TRUTH = {"private", "tuning", "private_pool", "tuning_pool"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0]


def imported_rooms(source):
    """The modules of gipip that a source text imports, wherever in it and in whichever form."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would hide a dependency"
            names = (
                [f"gipip.{alias.name}" for alias in node.names]
                if node.module == "gipip"
                else [node.module]
            )
        rooms |= {
            (name.split(".") + ["gipip"])[1] for name in names if name.split(".")[0] == "gipip"
        }
    return rooms


def ground_truth_in(source):
    """Attributes by which a private or tuning image could be drawn."""
    return {
        node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
    } & GROUND_TRUTH


def test_the_rule_is_checked_on_every_attack_and_prior():
    attacks = {
        "base.py",
        "dlg.py",
        "gias.py",
        "gipip.py",
        "gradinversion.py",
        "inverting_gradients.py",
        "labels.py",
        "loop.py",
        "traced.py",
    }
    assert attacks | {"autoencoder.py", "gan.py"} <= {path.name for path in ATTACKER}


@pytest.mark.parametrize("path", ATTACKER, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_attacks_and_priors_import_nothing_that_holds_ground_truth(path):
    assert imported_rooms(path.read_text()) <= ALLOWED[room_of(path)]


@pytest.mark.parametrize("path", ATTACKER, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_attacks_and_priors_draw_no_private_or_tuning_image(path):
    assert ground_truth_in(path.read_text()) == set()


@pytest.mark.parametrize("path", ATTACKER, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_attacks_and_priors_import_nothing_by_name_at_run_time(path):
    if path == PACKAGE / "attacks" / "__init__.py":
        assert "iter_modules(__path__)" in path.read_text(), "it may import its own modules only"
        return
    assert not re.search(
        r"\b(importlib|__import__|getattr|eval|exec)\b *[(.]",
        path.read_text().replace(".eval()", ""),
    )


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import gipip", {"gipip"}),
        ("import gipip.evaluation.metrics as m", {"evaluation"}),
        ("from gipip import experiments, figures", {"experiments", "figures"}),
        ("def f():\n    from gipip.data.datasets import Dataset", {"data"}),
        ("import torch", set()),
    ],
)
def test_the_check_sees_every_form_of_import(source, rooms):
    assert imported_rooms(source) == rooms


def test_the_check_sees_a_draw_of_private_images():
    assert ground_truth_in("def f(data):\n    return data.private(1)") == {"private"}


def test_a_shared_update_has_no_field_for_images():
    fields = set(gipip.SharedUpdate.__dataclass_fields__)
    crosses_the_wire = {
        "gradients",
        "parameter_names",
        "batch_size",
        "image_shape",
        "labels",
        "mode",
        "model_fingerprint",
    }
    assert fields == crosses_the_wire | {"fedavg", "statistics", "defenses"}
