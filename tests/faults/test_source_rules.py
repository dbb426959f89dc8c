"""What no source file may hold: ways to execute what is read, and what of accelerate is neither atomic nor exact.

The rules look at the syntax tree, so neither an alias nor a line break hides anything from them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import core

REPO = Path(core.__file__).parents[1]
FILES = sorted(p for name in ("core", "stages", "plugins") for p in (REPO / name).rglob("*.py"))

MODULES = {  # that unpickle, or read YAML with tags
    *("pickle", "cPickle", "_pickle", "pickletools", "dill", "joblib", "cloudpickle", "shelve", "marshal"),
    *("yaml", "code", "codeop", "pty", "commands"),
}
NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
CALLS = {  # by their full names, whatever they were imported as
    *(
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "torch.jit.load",
        "numpy.load",
        "numpy.save",
        "numpy.fromregex",
    ),
    *("os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("tempfile.mktemp", "shutil.unpack_archive", "pandas.read_pickle", "builtins.eval", "builtins.exec"),
    *("importlib.util.exec_module", "runpy.run_path", "runpy.run_module"),
}
PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
METHODS = {  # whatever object they are called on
    *(
        "save_state",
        "load_state",
        "register_for_checkpointing",
        "skip_first_batches",
        "find_executable_batch_size",
    ),
    *("unsafe_load", "full_load", "load_module", "exec_module"),
}
IMPORTLIB = {  # where modules may be imported by name: plugins, and our own by fixed names
    "core/selftest/preload.py": {"importlib.import_module"},
    "core/cli.py": {"importlib.import_module"},
    "core/plugins.py": {"importlib.import_module", "importlib.util.module_from_spec", "exec_module"},
}


class Rules(ast.NodeVisitor):
    """Collects what a file may not hold. `name` is its path in the repository."""

    def __init__(self, name: str) -> None:
        self.allowed = IMPORTLIB.get(name, set())
        self.names: dict[str, str] = {}  # what a local name stands for
        self.found: list[str] = []

    def report(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {getattr(node, 'lineno', 0)}: {what}")

    def full(self, node: ast.AST) -> str:
        """Dotted name of an expression, imports undone; an empty string where it is none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            inner = self.full(node.value)
            return f"{inner}.{node.attr}" if inner else f"?.{node.attr}"
        return ""

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.check_module(node, alias.name)
            top = alias.name.partition(".")[0]
            self.names[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        self.check_module(node, module)
        for alias in node.names:
            self.names[alias.asname or alias.name] = f"{module}.{alias.name}"
            self.check_module(node, f"{module}.{alias.name}")
            self.check_name(node, f"{module}.{alias.name}")

    def check_module(self, node: ast.AST, module: str) -> None:
        parts = module.split(".")
        if parts[0] in MODULES or module.startswith(("torch.multiprocessing.pickle", "numpy.lib.format")):
            self.report(node, f"imports {module}")

    def check_name(self, node: ast.AST, name: str) -> None:
        last = name.rpartition(".")[2]
        theirs = last in METHODS and last not in self.allowed and not name.startswith("core.")
        if name in CALLS or name.startswith(PREFIXES) or theirs:
            self.report(node, name)
        if name.startswith("importlib.") and name not in self.allowed and "import_module" in name:
            self.report(node, name)
        if name.startswith("importlib.util.module_from_spec") and name not in self.allowed:
            self.report(node, name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.check_name(node, self.full(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES and node.id not in self.names:
            self.report(node, node.id)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.full(node.func)
        last = name.rpartition(".")[2]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "shell" in given and not is_constant(given["shell"], False):
            self.report(node, f"{name}(shell=...)")
        if "allow_pickle" in given and not is_constant(given["allow_pickle"], False):
            self.report(node, f"{name}(allow_pickle=...)")
        if "trust_remote_code" in given and not is_constant(given["trust_remote_code"], False):
            self.report(node, f"{name}(trust_remote_code=...)")
        if "weights_only" in given:
            self.report(node, f"{name}(weights_only=...): a pickle all the same")
        if last == "YAML" and not is_constant(given.get("typ"), "safe"):
            self.report(node, "YAML() without typ='safe'")
        if last in ("extractall", "extract") and not is_constant(given.get("filter"), "data"):
            self.report(node, f"{last}() without filter='data'")
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is None and isinstance(node.value, ast.Dict):  # f(**{"shell": True})
            for key in node.value.keys:
                if isinstance(key, ast.Constant) and key.value in (
                    "shell",
                    "allow_pickle",
                    "trust_remote_code",
                ):
                    self.report(node.value, f"{key.value}=...")
        self.generic_visit(node)


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def broken_rules(source: str, name: str = "core/x.py") -> list[str]:
    rules = Rules(name)
    tree = ast.parse(source)
    for node in ast.walk(tree):  # imports first: they say what the names stand for
        if isinstance(node, ast.Import):
            rules.visit_Import(node)
        elif isinstance(node, ast.ImportFrom):
            rules.visit_ImportFrom(node)
    rules.found.clear()
    rules.visit(tree)
    return rules.found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_every_file_keeps_the_rules(path: Path) -> None:
    name = path.relative_to(REPO).as_posix()
    assert broken_rules(path.read_text(encoding="utf-8"), name) == []


def test_there_are_files_to_look_at() -> None:
    names = {path.relative_to(REPO).as_posix() for path in FILES}
    assert {"core/params.py", "stages/train.py", "core/selftest/inputs.py"} <= names
    assert any(name.startswith("plugins/") for name in names) and len(names) > 40


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import cPickle",
        "import dill",
        "import joblib",
        "from joblib import load",
        "import cloudpickle",
        "import shelve",
        "import marshal",
        "import os, marshal",
        "def f():\n    import pickle",
        "import yaml",
        "import yaml\nyaml.load(x)",
        "from yaml import unsafe_load",
        "import torch\ntorch.load(x)",
        "import torch\ntorch.load(x, weights_only=True)",
        "import torch as t\nt.load(x)",
        "from torch import load",
        "from torch import load as read\nread(x)",
        "import torch\nreader = torch.load",
        "import torch\ntorch.save(x, y)",
        "import torch.hub\ntorch.hub.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import numpy as np\nnp.load(x)",
        "import numpy\nnumpy.memmap(x, allow_pickle=flag)",
        "from numpy import load",
        "eval('1')",
        "exec(code)",
        "compile(a, b, 'exec')",
        "f = eval",
        "import builtins\nbuiltins.exec(x)",
        "__import__('os')",
        "import os\nos.system('x')",
        "from os import system",
        "import os\nos.popen('x')",
        "import os\nos.execvp('x', [])",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.Popen(x, shell=flag)",
        "import subprocess\nsubprocess.run('x', **{'shell': True})",
        "import subprocess\nsubprocess.getoutput('x')",
        "from subprocess import run\nrun('x',\n    shell=True)",
        "from ruamel.yaml import YAML\nYAML()",
        "from ruamel.yaml import YAML\nYAML(typ='unsafe')",
        "from ruamel.yaml import YAML as Y\nY(typ='rt')",
        "import ruamel.yaml\nruamel.yaml.YAML(pure=True)",
        "from datasets import load_dataset\nload_dataset('x', trust_remote_code=True)",
        "accelerator.save_state(x)",
        "accelerator.load_state(x)",
        "self.accelerator.register_for_checkpointing(x)",
        "accelerator.skip_first_batches(x, 3)",
        "from accelerate import skip_first_batches",
        "from accelerate.utils import find_executable_batch_size",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "import tarfile\ntarfile.open(x).extractall()",
        "import tarfile\ntarfile.open(x).extractall(y, filter='fully_trusted')",
        "import zipfile\nzipfile.ZipFile(x).extractall(y)",
        "import shutil\nshutil.unpack_archive(x)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "import importlib.util\nimportlib.util.module_from_spec(s)",
        "spec.loader.exec_module(m)",
    ],
)
def test_the_rules_catch(source: str) -> None:
    assert broken_rules(source), source


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import torch\ntorch.compile(model)\ntorch.inference_mode()",
        "import json\njson.load(f)\njson.loads(s)",
        "from ruamel.yaml import YAML\nYAML(typ='safe', pure=True).load(s)",
        "import subprocess\nsubprocess.run(['x'], check=True, shell=False)",
        "import numpy as np\nnp.memmap(x, dtype='<u2')\nnp.frombuffer(x)",
        "from core.plan import load_state\nload_state(x)",
        "model.load_state_dict(x)\noptimizer.state_dict()",
        "import tarfile\ntarfile.open(x).extractall(y, filter='data')",
        "import multiprocessing\nmultiprocessing.get_context('spawn')",
        "import tempfile\ntempfile.mkstemp()",
        "'pickle.load(x); eval(y)'",
        "import importlib.metadata\nimportlib.metadata.version('x')",
        "import importlib.util\nimportlib.util.find_spec('x')",
    ],
)  # fmt: skip
def test_the_rules_let_through(source: str) -> None:
    assert broken_rules(source) == []


def test_modules_are_imported_by_name_in_three_places_only() -> None:
    source = "import importlib\nimportlib.import_module(name)"
    assert not broken_rules(source, "core/cli.py") and not broken_rules(source, "core/plugins.py")
    assert not broken_rules(source, "core/selftest/preload.py")
    assert broken_rules(source, "core/plan.py")
