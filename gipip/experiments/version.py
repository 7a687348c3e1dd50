"""The version of the code that computes results: they are never reused when it has changed."""

import ast
import functools
import hashlib
import inspect
import marshal
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

_COMPUTES = re.compile(r"gipip\.(attacks|federation|priors|evaluation|experiments\.scenario)\b")
_ALWAYS = ("gipip.evaluation.metrics", "gipip.experiments.scenario")


@functools.cache
def code_version(attack: type) -> str:
    """12 hex digits that change with every statement on which the results of this attack depend.

    Of the modules of the attack, the scenario and the metrics, and what they import of
    attacks, clients and priors, without comments and docstrings; data and weights have
    fingerprints of their own. Of an attack defined outside gipip also the instructions
    of its methods, but not of what these call outside gipip. Python 3.11 writes the
    same statements down otherwise than later ones, and so computes anew.
    """
    digest = hashlib.sha256()
    modules = _import_closure([*_ALWAYS, *(cls.__module__ for cls in attack.__mro__)])
    for name in sorted(modules):
        statements = _WithoutTexts().visit(modules[name])
        digest.update(f"{name}\n{ast.unparse(statements)}\n".encode())
    for name, code in _own_methods(attack):
        digest.update(name.encode() + marshal.dumps(_placeless(code), 2))
    return digest.hexdigest()[:12]


def _import_closure(waiting: list[str]) -> dict[str, ast.Module]:
    """These modules and all that they import, as far as they compute.

    Only what a statement names: the `__init__` of a package would import all of the package.
    """
    found: dict[str, ast.Module] = {}
    while waiting:
        name = waiting.pop()
        if name not in found and _COMPUTES.match(name) and (file := _file(name)):
            found[name] = ast.parse(file.read_bytes())
            waiting += _imported(found[name])
    return found


def _file(module: str) -> Path | None:
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next(filter(Path.exists, files), None)


def _imported(tree: ast.Module) -> Iterator[str]:
    """What import statements name: modules, and what may be one or something in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


class _WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def _own_methods(attack: type) -> Iterator[tuple[str, CodeType]]:
    """Those that are defined outside gipip: a class from a notebook has no source in
    another process, and a random number in its pickle.
    """
    for cls in attack.__mro__:
        if cls.__module__.startswith("gipip."):
            return
        for name, member in sorted(vars(cls).items()):
            function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if inspect.isfunction(function) and function.__module__ == cls.__module__:
                yield name, function.__code__


def _placeless(code: CodeType) -> CodeType:
    """Without the file and the lines it stands in."""
    inner = (_placeless(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    bare = code.replace(co_filename="", co_firstlineno=1, co_linetable=b"")
    return bare.replace(co_consts=tuple(inner))
