"""The version of the code that computes results: they are never reused when it has changed."""

import ast
import functools
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_COMPUTES = ("attacks", "federation", "priors", "evaluation/metrics.py")


@functools.cache
def code_version() -> str:
    """12 hex digits that change with every statement on which a result depends.

    Of the modules of attacks, clients, priors and metrics, without comments and docstrings.
    """
    digest = hashlib.sha256()
    for name in _COMPUTES:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(_statements(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _statements(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [statement for statement in body if not _is_text(statement)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
