"""The version of the code that computes results: they are never reused when it has changed."""

import ast
import functools
import hashlib
import inspect
from itertools import takewhile
from pathlib import Path
from types import CodeType

_COMPUTE = (  # results, besides data and weights; patterns of files of the package
    "attacks/**/*.py",
    "federation/*.py",
    "priors/*.py",
    "evaluation/metrics.py",
    "experiments/scenario.py",
)


@functools.cache
def code_version() -> str:
    """12 hex digits that change with every statement on which a result depends.

    Of the modules of attacks, clients, priors and metrics, without comments and docstrings. Python
    3.11 writes the same statements down otherwise than later ones, and so computes anew.
    """
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in _COMPUTE:
        for file in sorted(package.glob(pattern)):
            statements = _WithoutTexts().visit(ast.parse(file.read_bytes()))
            digest.update(f"{file.relative_to(package)}\n{ast.unparse(statements)}\n".encode())
    return digest.hexdigest()[:12]


class _WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


@functools.cache
def own_version(attack: type) -> str:
    """Changes with the methods of an attack that is defined outside gipip; "" for gipip's own.

    Of their instructions, as a class from a notebook has no source in another process. What these
    methods call outside gipip is not known here.
    """
    own = takewhile(lambda cls: not cls.__module__.startswith("gipip."), attack.__mro__)
    instructions = []
    for cls in own:
        for name, member in sorted(vars(cls).items()):
            function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
            if inspect.isfunction(function) and function.__module__ == cls.__module__:
                instructions.append((name, _instructions(function.__code__)))
    return hashlib.sha256(repr(instructions).encode()).hexdigest() if instructions else ""


def _instructions(code: CodeType) -> tuple:
    return code.co_code, code.co_names, [_constant(value) for value in code.co_consts]


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _instructions(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value
