"""The version of the code that computes results: they are never reused when it has changed."""

import ast
import functools
import hashlib
from pathlib import Path

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
