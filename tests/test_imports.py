"""Imports run one way: from the definition of attention up to the commands, and never back."""

import ast

import pytest

from conftest import ROOT

# From the bottom.
ORDER = ["attention", "files", "tokenizer_settings", "tokenizer", "load_weights", "fast", "base", "configs", "sampling", "task_heads",
         "neo", "neox", "score", "training", "generate", "mistakes", "diagnose", "vectors",
         "compare", "train", "benchmarks", "benchmark"]
# The factory Auto... imports the models when it is called.
FACTORY = {("load_weights", "neo"), ("load_weights", "neox")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):       # inside functions too
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", [n for n in ORDER if n not in ("fast", "training", "benchmarks")])
def test_imports_run_one_way(name):
    for other in set(imports(ROOT / f"{name}.py")) & set(ORDER) - {name}:
        assert ORDER.index(other) < ORDER.index(name) or (name, other) in FACTORY, f"{name} imports {other}"
