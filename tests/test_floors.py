"""Who may import whom: read from the source with `ast`, wherever in a file the import stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import distllm

ROOT = Path(distllm.__file__).parent

NOUNS = {"core", "config", "validation"}
MIDDLE = {"model", "plan", "net"}
DOORS = {"", "llm", "run", "compose", "generate", "batch", "shards", "bench", "serve", "chat", "terminal"}
ALLOWED = (
    {"core": set(), "config": {"core"}, "validation": {"core", "config"}, "journal": {"core"}, "grammars": {"core"}}
    | {"logs": set(), "engine": NOUNS | MIDDLE | {"logs"}}
    | dict.fromkeys(MIDDLE, NOUNS)
    | dict.fromkeys(DOORS, NOUNS | MIDDLE | {"engine", "journal", "grammars", "logs"} | DOORS)
)
# Who must start fast, or is pure: no torch when these are imported.
TORCHLESS = {
    "",
    "core",
    "config",
    "validation",
    "compose",
    "generate",
    "batch",
    "journal",
    "run",
    "shards",
    "serve",
    "grammars",
    "logs",
    "chat",
    "terminal",
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its whole name."""

    file: str
    line: int
    name: str
    at_start: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"

    def is_of(self, package: str) -> bool:
        return self.name == package or self.name.startswith(f"{package}.")


class Reader(ast.NodeVisitor):
    """Collects the imports of one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Import] = []
        self._in_function = self._in_typing = False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = ["distllm", *self.file.removesuffix(".py").split("/")][: -node.level] if node.level else []
        module = ".".join([*package, *([node.module] if node.module else [])])
        for alias in node.names:
            self._add(node, f"{module}.{alias.name}")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        before = self._in_typing
        self._in_typing = before or ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self._in_typing = before
        for child in node.orelse:
            self.visit(child)

    def _add(self, node: ast.stmt, name: str) -> None:
        at_start = not (self._in_function or self._in_typing)
        self.found.append(Import(self.file, node.lineno, name, at_start, self._in_typing))


def imports_of(source: str, file: str) -> list[Import]:
    reader = Reader(file)
    reader.visit(ast.parse(source))
    return reader.found


def house() -> Iterator[Import]:
    for path in sorted(ROOT.rglob("*.py")):
        yield from imports_of(path.read_text(), path.relative_to(ROOT).as_posix())


def part_of(file: str) -> str:
    """The floor or door that a file belongs to: the first word of its path; "" is the package itself."""
    return file.split("/")[0].removesuffix(".py").removeprefix("__init__")


def part_imported(name: str) -> str | None:
    """The part of distllm that an import is of; None if it is of others."""
    package, _, rest = name.partition(".")
    if package != "distllm":
        return None
    part = rest.split(".")[0]
    return part if (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file() else ""


def is_rival(each: Import) -> bool:
    return each.file.startswith("bench/rivals/")


def violations(imports: Iterator[Import] | list[Import]) -> list[str]:
    """What breaks the rules, in words."""
    found = []
    for each in imports:
        part, target = part_of(each.file), part_imported(each.name)
        broken = [
            target is not None and target != part and target not in ALLOWED.get(part, set()),
            each.is_of("torch.distributed") and part != "net" and not is_rival(each),
            each.is_of("torch") and part == "plan" and not each.typing,
            each.is_of("torch") and part in TORCHLESS and each.at_start,
            each.is_of("hydra") and each.file != "compose.py",
            each.is_of("transformers") and part != "model" and not is_rival(each),
        ]
        if any(broken):
            found.append(str(each))
    return found


def test_every_part_has_its_floor() -> None:
    parts = {part_of(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*.py")}
    assert parts - {"conf"} <= set(ALLOWED), "a new part needs a floor in ALLOWED"


def test_the_floors_hold() -> None:
    assert violations(house()) == []


def test_no_two_modules_import_each_other_in_a_ring() -> None:
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py")}
    graph: dict[str, set[str]] = {file: set() for file in files}
    for each in house():
        words = each.name.split(".")
        for length in (len(words), len(words) - 1):
            target = "/".join(words[1:length])
            if words[0] == "distllm" and target in files and not each.typing:
                graph[each.file.removesuffix(".py")].add(target)
                break
    assert any(graph.values())
    while leaves := {file for file, targets in graph.items() if not targets & set(graph)}:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"among these is a ring: {sorted(graph)}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core.py", "from distllm.config import Config"),
        ("config.py", "from distllm.plan.partition import partition"),
        ("model/shard.py", "from distllm.net.wire import Wire"),
        ("model/shard.py", "from distllm import net"),
        ("plan/scheduler.py", "def f():\n    import distllm.model.shard"),
        ("net/wire.py", "from ..plan import partition"),
        ("net/wire.py", "from ..engine.master import Master"),
        ("engine/master.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distllm.llm import LLM"),
        ("engine/master.py", "from distllm import LLM"),
        ("engine/home.py", "import torch.distributed as dist"),
        ("engine/home.py", "from torch import distributed"),
        ("llm.py", "def f():\n    from torch.distributed.rpc import rpc_sync"),
        ("plan/partition.py", "def f():\n    import torch"),
        ("run.py", "import torch"),
        ("generate.py", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass"),
        ("run.py", "from hydra import compose"),
        ("engine/engine.py", "async def f():\n    from transformers import AutoConfig"),
        ("bench/run.py", "import transformers"),
    ],
)
def test_a_broken_floor_is_seen(file: str, source: str) -> None:
    assert len(violations(imports_of(source, file))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("config.py", "from distllm.core import SamplingParams"),
        ("plan/blocks.py", "from distllm.plan.partition import partition\nfrom .scheduler import Scheduler"),
        ("core.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("run.py", "def f():\n    import torch"),
        ("bench/rivals/native.py", "import torch.distributed\nimport transformers"),
        ("model/shard.py", "from transformers import AutoConfig\nimport torch"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert violations(imports_of(source, file)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import distllm",
        "import distllm.run, distllm.generate, distllm.batch",
        "import distllm.serve.front",
        "import runpy\nsys.argv[1:] = ['--help']\nos._exit = lambda code: None\n"
        "runpy.run_module('distllm.run', run_name='__main__')",
        "import distllm\ndistllm.SamplingParams(max_tokens=3)",
    ],
    ids=["distllm", "doors", "front", "help", "params"],
)
def test_imports_no_torch(code: str) -> None:
    ending = "print(*{'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys\n{code}\n{ending}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
