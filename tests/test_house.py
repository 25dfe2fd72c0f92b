"""The house rules that a test can check: imports point down only, and no file of vlft uses forbidden calls."""

import ast
import re

import pytest
import rooms

FILES = rooms.modules()


def _wrong_imports(source: str, module: str) -> list[str]:
    known = {*FILES, module}
    found = rooms.imports_in(source, module, known)
    return [fault for one in found if (fault := rooms.fault_of(one)) is not None]


def test_every_module_has_its_room():
    strangers = [module for module in FILES if rooms.room_of(module) is None]
    assert not strangers, "give them a room in tests/rooms.py"


def test_imports_point_down():
    wrong = []
    for module, file in FILES.items():
        for one in rooms.imports_in(file.read_text(), module, set(FILES), is_package=file.name == "__init__.py"):
            wrong += [fault] if (fault := rooms.fault_of(one)) is not None else []
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    assert rooms.circles(rooms.arrows()) == []


def test_a_circle_is_seen():
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlft.model.load import x", "vlft.data.encode"),
        ("import vlft.train", "vlft.checkpoint.files"),
        ("def f():\n    from vlft.merge import merge", "vlft.train.run"),
        ("from vlft import demo", "vlft.plan"),
        ("from ..cli import main", "vlft.data.order"),
        ("from vlft.config.flags import x", "vlft.families"),
        ("from vlft.data.encode import Encoder", "vlft.data.rows.turns"),
        ("from vlft.data.rows.turns import x", "vlft.data.media.read"),
        ("from vlft.data.costs.packing import x", "vlft.data.encode"),
    ],
)
def test_the_walk_sees_a_wrong_import(source, module):
    assert len(_wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from vlft.data.sample import Sample\nfrom .positions import x", "vlft.data.encode"),
        ("from vlft.errors import VlftError\nfrom vlft import __version__, families", "vlft.data.encode"),
        ("import torch\nfrom vlft.train.run import run\nfrom vlft.cli.stdout import json_only", "vlft.cli.train"),
    ],
)
def test_the_walk_lets_a_right_import_pass(source, module):
    assert _wrong_imports(source, module) == []


UNPICKLERS = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
# Calls that run code from the file that they read, or from their argument.
RUNS_CODE = (
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "cloudpickle.load"),
    *("cloudpickle.loads", "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "read_pickle"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
)


_RUNS = re.compile(rf"(^|\.)({'|'.join(map(re.escape, RUNS_CODE))})$")


def _forbidden(source: str) -> list[str]:
    """Calls that rule 10 and safety forbid, with their lines. Comments and docstrings may name them."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _faults(node)]


def _faults(node: ast.AST):
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        yield "bare except"
    elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
        yield f"from {node.module} import"  # under another name the check of calls below would miss it
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        words = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
        banned = {"trust_remote_code=True", "allow_pickle=True", "shell=True"}
        if called != "zip":  # for zip it only means that lengths may differ
            banned.add("strict=False")
        yield from (word for word in words if word in banned)
        if called in ("eval", "exec") or _RUNS.search(called):
            yield called
        if re.search(r"(^|\.)torch\.load$", called) and "weights_only=True" not in words:
            yield "torch.load without weights_only=True"


def test_nothing_forbidden():
    # A deliberate exception would be listed here with its reason. There is none.
    wrong = [f"{module}:{line}" for module, file in FILES.items() for line in _forbidden(file.read_text())]
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


def test_no_test_file_imports_another():
    """Shared helpers are in files of their own (`runs`, `models` and others) or in conftest."""
    files = (rooms.ROOT / "tests").glob("*.py")
    wrong = [file.name for file in files if re.search(r"^ *(from|import) test_", file.read_text(), re.M)]
    assert not wrong


def test_files_are_read_in_one_sitting():
    long = {module: count for module, file in FILES.items() if (count := len(file.read_text().splitlines())) > 350}
    assert not long
