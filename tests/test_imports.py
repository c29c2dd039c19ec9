"""Imports run one way: from the definition of attention up to the commands, and never back."""

import ast
import tomllib

import pytest

from conftest import ROOT

# From the bottom.
ORDER = ["attention", "files", "commands", "pictures", "processes", "parallel", "tokenizer_settings", "tokenizer", "originals", "quantize", "transformers_arguments", "bin_files",
         "load_weights", "fast", "base", "configs", "sampling", "task_heads",
         "neo", "neox", "neo_jax", "convert", "score", "training", "generate", "mistakes", "diagnose", "vectors",
         "look", "compare", "train", "benchmarks", "benchmark"]
# The factory Auto... imports the models when it is called.
FACTORY = {("load_weights", "neo"), ("load_weights", "neox")}
FOLDERS = ("originals", "fast", "training", "benchmarks")
FILES = [ROOT / f"{name}.py" for name in ORDER if name not in FOLDERS]
FILES += [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
# What a function may import: packages that need not be installed, or are no part of every Python,
OPTIONAL = {"triton", "flash_attn", "transformers", "tokenizers", "matplotlib", "sklearn", "gguf", "resource",
            "msgpack", "jax"}
# and, by file, what would make an import of that file slow.
LATE = {"sampling.py": {"fast.step"},                           # loads torch's compiler
        "benchmarks/backends.py": {"torch.nn.attention.flex_attention"},         # so does this
        "benchmarks/competitors.py": {"benchmarks.llama_cpp"},  # needs llama_cpp, which is optional
        "benchmarks/in_jax.py": {"neo_jax"},                    # needs jax, which is optional
        "benchmarks/llama_cpp.py": {"llama_cpp", "xllamacpp"},  # the packages of these names
        "files.py": {"huggingface_hub", "huggingface_hub.utils"},                # a folder needs no hub
        "tokenizer.py": {"numpy", "torch"},                     # only where arrays or tensors are asked for
        "load_weights.py": {"neo", "neox", "tokenizer"}}        # the factory Auto...


def imports(path):
    """Every module that a file imports, inside functions too."""
    return names(ast.parse(path.read_text(encoding="utf-8")))


def names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are written with the whole name"
            yield node.module


def inside_functions(path):
    """Those that it imports in functions alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from names(node)


def label(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_run_one_way(path):
    """A folder counts as one place in the order; within it files import each other as they like."""
    name = label(path).removesuffix(".py").split("/")[0]
    for other in {module.split(".")[0] for module in imports(path)} & set(ORDER) - {name}:
        assert ORDER.index(other) < ORDER.index(name) or (name, other) in FACTORY, f"{label(path)} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_functions_import_only_what_must_wait(path):
    allowed = LATE.get(label(path), set())
    wrong = {m for m in inside_functions(path) if m not in allowed and m.split(".")[0] not in OPTIONAL}
    assert not wrong, f"{label(path)} imports {', '.join(sorted(wrong))} inside a function"


def test_no_late_import_is_allowed_in_vain():
    """A row of the table that has lost its import would let one in again unseen."""
    for name, modules in LATE.items():
        assert modules <= set(inside_functions(ROOT / name)), name


def test_every_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS) == set(ORDER)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_test_file_is_imported(path):
    """What two files of tests share stands in a file of its own."""
    assert [module for module in imports(path) if module.split(".")[0].startswith("test_")] == []


def test_pip_installs_every_module():
    """pip install . copies what pyproject.toml lists, and nothing else."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert sorted(listed["packages"]) == sorted(FOLDERS)
