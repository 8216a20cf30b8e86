"""Nothing that is read can carry code: no module of ours imports, or calls, what would run it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("spotjax", "models", "meshes", "tools")
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CALLS = {"eval", "exec"}
LOADERS = ("torch", "yaml")
"""Of which ``load`` runs what it reads; ``yaml.safe_load`` does not."""
METHODS = {"unsafe_load", "full_load"}

COMPILED = {"spotjax/runtime/executables.py": ["pickle"]}
"""Compiled programs are code by nature, and jax's own format for them is pickle: see docs/security.md."""


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def found(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that came as data."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield f"{name}()"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="load")) if name in LOADERS:
                yield f"{name}.load()"
            case ast.Call(func=ast.Attribute(attr=name)) if name in METHODS:
                yield f"{name}()"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle=True"


def test_no_module_reads_what_can_carry_code() -> None:
    assert len(sources()) > 300
    carriers = {str(path.relative_to(ROOT)): list(found(ast.parse(path.read_text()))) for path in sources()}
    assert {path: what for path, what in carriers.items() if what} == COMPILED


def test_what_could_run_code_would_be_found() -> None:
    text = "import pickle, os\nfrom dill import loads\neval('1')\ntorch.load(x)\nnp.load(x, allow_pickle=True)\n"
    assert set(found(ast.parse(text))) == {"pickle", "dill", "eval()", "torch.load()", "allow_pickle=True"}
