"""The architecture, read from the source: imports go downward only, and no file can make the program run code."""

import ast
import functools
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import recsys_lightning

ROOT = Path(recsys_lightning.__file__).parent
OURS = "recsys_lightning"


def module_name(path: Path) -> str:
    parts = (OURS, *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def within(name: str, *parents: str) -> bool:
    """Whether a dotted name is one of `parents` or lies in one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"{OURS}.{name}" for name in names)


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@functools.cache
def imports(module: str) -> frozenset[str]:
    """All that a module imports, also inside functions; ``from a import b`` counts as ``a.b``: b may be a module."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return frozenset(found)


def reached(module: str) -> dict[str, str]:
    """Whatever importing a module may bring with it, and which of our modules asks for it."""
    found: dict[str, str] = {}
    todo, done = [module], set()
    while todo:
        current = todo.pop()
        done.add(current)
        for name in imports(current):
            found.setdefault(name, current)
            parts = name.split(".")
            parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]  # their __init__ files run too
            todo += [parent for parent in parents if parent in MODULES and parent not in done]
    return found


LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
ABOVE = {
    # layer: what it must not import
    ours("errors", "files"): (*LIGHTNING, "torch", OURS),
    ours("losses", "nn", "semantic_ids", "retrieval", "metrics"): (
        *LIGHTNING,
        *ours("models", "training", "analysis", "cli"),
    ),
    ours("data"): ours("nn", "losses", "semantic_ids", "retrieval", "models", "training", "analysis", "cli"),
    ours("models"): (*LIGHTNING, *ours("training", "analysis", "cli")),
    ours("training"): ours("analysis", "cli"),
    ours("analysis"): ours("cli"),
}
# The glue to Lightning of the data layer; the types beside it know nothing of it.
GLUE = ours("data.datamodules")[0]


@pytest.mark.parametrize(("layer", "above"), ABOVE.items(), ids=[",".join(layer) for layer in ABOVE])
def test_imports_go_downward_only(layer, above):
    members = [module for module in MODULES if within(module, *layer)]
    assert members
    found = {f"{module} imports {name}" for module in members for name in imports(module) if within(name, *above)}
    assert not found


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, *ours("data")) and m != GLUE])
def test_data_types_know_nothing_of_lightning(module):
    assert not [name for name in imports(module) if within(name, *LIGHTNING, GLUE)]


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, *ours("models"))])
def test_models_work_without_lightning(module):
    """Not even through a module that they import."""
    assert not {name: asker for name, asker in reached(module).items() if within(name, *LIGHTNING)}


def test_only_metrics_and_training_know_torchmetrics():
    users = {module for module in MODULES if any(within(name, "torchmetrics") for name in imports(module))}
    assert all(within(user, *ours("metrics", "training")) for user in users), users


def test_faiss_is_a_matter_of_retrieval():
    users = {module for module in MODULES if any(within(name, "faiss") for name in imports(module))}
    assert all(within(user, *ours("retrieval")) for user in users), users


# ------------------------------------------------------------------------------------------ nothing that is read is run


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """Each call in a module, with its dotted name as written."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_checkpoints_are_read_as_data_only():
    loads = [(module, node) for module in MODULES for name, node in calls(module) if name == "torch.load"]
    assert loads, "this test looks for torch.load under that name"
    assert not [module for module in MODULES if "torch.load" in imports(module)], "call it torch.load"
    for module, node in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("weights_only") == "True", f"{module} line {node.lineno}"


def test_nothing_unpickles_or_evaluates():
    runners = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    allowed = {"pickle.UnpicklingError"}  # what torch.load raises on a file it refuses
    for module in MODULES:
        assert not {name for name in imports(module) if within(name, *runners)} - allowed, module
        for name, node in calls(module):
            where = f"{module} line {node.lineno}: {name}"
            assert name not in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system"), where
            assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), where
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("shell", "False") == "False", where
            assert given.get("trust_remote_code", "False") == "False", where


# ---------------------------------------------------------------------------------------- what the paper leaves open


def explained(module: str) -> str:
    """The docstrings and comments of a module."""
    source = MODULES[module].read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    texts += [ast.get_docstring(node) or "" for node in ast.walk(tree(module)) if isinstance(node, documented)]
    return "\n".join(texts)


@functools.cache
def choices() -> frozenset[str]:
    """The codes of choices that docstrings and comments name one by one: a range such as C1 to C22 names none."""
    text = "\n".join(map(explained, MODULES))
    return frozenset(re.findall(r"\bC\d+\b", re.sub(r"\bC\d+ to C\d+\b", "", text)))


@pytest.mark.parametrize("code", [f"C{number}" for number in range(1, 23)])
def test_every_choice_that_cobra_leaves_open_is_named_where_it_is_made(code):
    assert code in choices()
