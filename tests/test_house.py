"""The house rules a machine can check: imports point down only, and what no file of vlft may hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "vlft").rglob("*.py"))

# Top-level module or package of vlft -> its level (design.md, section 3). A module may import what lies below it, and
# its own package; two on one level are strangers. `vlft` itself holds the version only; `vlft.__main__` calls cli.
LEVELS = {
    "vlft": 0,
    "errors": 0,
    "families": 0,
    "files": 0,
    "interrupts": 0,
    "config": 1,
    "data": 2,
    "batches": 2.5,  # flags and costs -> the order of a run
    "model": 2,
    "checkpoint": 3,
    "inputs": 3.5,  # opens base and rows for the features; came after the levels had their numbers
    "prompts": 3.5,  # rows -> what a model is asked
    "train": 4,
    "merge": 4,
    "check": 4,
    "preview": 4,
    "plan": 4,
    "chat": 4,
    "importing": 4,
    "report": 4,
    "demo": 5,
    "bench": 5,
    "cli": 6,
    "__main__": 7,
}
FOR_ALL = ("vlft", "errors", "families", "interrupts")


def _module(file: Path) -> str:
    """`vlft/data/order.py` -> `vlft.data.order`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _house(module: str) -> str:
    """The entry of LEVELS a module belongs to: `vlft.data.order` -> `data`."""
    return module.split(".")[1] if "." in module else module


def _imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, module of vlft) for every import, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + is_package]
                source = ".".join([*base, *([node.module] if node.module else [])])
            if source == "vlft":  # `from vlft import errors` names modules, but for `__version__`
                found += [(node.lineno, f"vlft.{name.name}" if name.name in LEVELS else "vlft") for name in node.names]
            else:
                found.append((node.lineno, source))
    return [(line, name) for line, name in found if name.split(".")[0] == "vlft"]


def _wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    ours = _house(module)
    wrong = []
    for line, target in _imports(ast.parse(source), module, is_package):
        theirs = _house(target)
        if theirs == ours or (theirs in FOR_ALL and ours not in FOR_ALL) or theirs in ("vlft", "errors"):
            continue
        if theirs not in LEVELS or ours not in LEVELS:
            wrong.append(f"{module}:{line} imports {target}: one of them has no level")
        elif LEVELS[theirs] >= LEVELS[ours]:
            direction = "sideways" if LEVELS[theirs] == LEVELS[ours] else "up"
            wrong.append(f"{module}:{line} imports {target} ({direction}: {LEVELS[ours]} -> {LEVELS[theirs]})")
    return wrong


def test_every_module_has_its_level():
    strangers = {_house(_module(file)) for file in FILES} - set(LEVELS)
    assert not strangers, "give them a level in the table above"


def test_imports_point_down():
    wrong = [
        line for file in FILES for line in _wrong_imports(file.read_text(), _module(file), file.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlft.model.load import x", "vlft.data.encode"),
        ("import vlft.train", "vlft.checkpoint.files"),
        ("def f():\n    from vlft.merge import merge", "vlft.train.run"),
        ("from vlft import demo", "vlft.plan"),
        ("from ..cli import main", "vlft.data.order"),
        ("from vlft.config.data import x", "vlft.families"),
    ],
)
def test_the_walk_sees_a_wrong_import(source, module):
    assert len(_wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlft.data.sample import Sample\nfrom .order import x", "vlft.data.encode"),
        ("from vlft.errors import VlftError\nfrom vlft import __version__, families", "vlft.config.data"),
        ("import torch\nfrom vlft.train.run import run\nfrom vlft.cli.stdout import json_only", "vlft.cli.train"),
    ],
)
def test_the_walk_lets_a_right_import_pass(source, module):
    assert _wrong_imports(source, module) == []


def _calls(tree: ast.AST, name: str):
    """Calls of `name`, written with dots or as the last part of an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(rf"(^|\.){re.escape(name)}$", ast.unparse(node.func)):
            yield node


UNPICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
# What runs code that stands in the file it reads, or in its argument.
RUNS_CODE = (
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load"),
    *("cloudpickle.loads", "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "read_pickle"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
)


def _forbidden(source: str) -> list[str]:
    """What rule 10 and safety forbid, each with its line. Looks at code, so comments and docstrings may name it."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
            banned = {"trust_remote_code=True", "allow_pickle=True", "shell=True"}
            if ast.unparse(node.func) != "zip":  # there it only says that lengths differ
                banned.add("strict=False")
            found += [f"{node.lineno}: {word}" for word in words if word in banned]
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{node.lineno}: bare except")
    for name in RUNS_CODE:
        found += [f"{call.lineno}: {name}" for call in _calls(tree, name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found.append(f"{node.lineno}: from {node.module} import")  # by another name it would not be seen above
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(f"{node.lineno}: {node.func.id}")
    for call in _calls(tree, "torch.load"):
        safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
        found += [] if safe else [f"{call.lineno}: torch.load without weights_only=True"]
    return found


def test_nothing_forbidden():
    # One deliberate exception would be named here with its reason; there is none.
    wrong = [f"{_module(file)}:{line}" for file in FILES for line in _forbidden(file.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "load(x, trust_remote_code=True)",
        "model.load_state_dict(state, strict=False)",
        "try:\n    f()\nexcept:\n    pass",
        "import pickle\npickle.load(f)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import pandas\npandas.read_pickle(path)",
        "from pickle import loads\nloads(data)",
        "import subprocess\nsubprocess.run(name, shell=True)",
        "eval(text)",
    ],
)
def test_the_walk_sees_what_is_forbidden(source):
    assert len(_forbidden(source)) == 1


def test_ordinary_code_is_not_forbidden():
    source = "model.eval()\nyaml.safe_load(text)\nnp.load(path, allow_pickle=False)\nzip(a, b, strict=False)"
    assert _forbidden(source + "\ntorch.load(path, weights_only=True)") == []


def test_files_are_read_in_one_sitting():
    long = {_module(file): count for file in FILES if (count := len(file.read_text().splitlines())) > 350}
    assert not long
