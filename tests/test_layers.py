"""Imports go down only: the layers of zrl, held by reading the imports of every module.

    cli → launch → train → rollout → nodes → {net, collect} → {protocol, data}

`zoo` and `algo` stand beside this line: see the table. Imports for typing alone count too: what a module names, it
knows.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "zrl"

#: What the modules of each part may import of ours, besides their own part and OPEN_TO_ALL.
MAY_IMPORT: dict[str, set[str]] = {
    "data": set(),
    "protocol": set(),
    "net": {"protocol", "data"},
    "collect": {"data"},
    "nodes": {"net", "collect", "protocol", "data"},
    "rollout": {"nodes", "net", "collect", "protocol", "data"},
    "algo": set(),
    "zoo": {"algo", "collect", "data"},
    "train": {"rollout", "nodes", "net", "collect", "protocol", "data", "algo", "zoo"},
    "launch": {"train", "rollout", "nodes", "net", "collect", "protocol", "data"},
    "cli": {"launch", "train", "rollout", "nodes", "net", "collect", "protocol", "data", "algo", "zoo"},
    "__main__": {"cli"},
    # these know nothing of ours; but a setting out of its bounds is an error of the tree (decision 0001)
    "config": {"errors"},
    "errors": set(),
    "metrics": set(),
}
OPEN_TO_ALL = {"config", "errors", "metrics"}
#: Who may import `zrl` itself, which imports nearly everything.
ABOVE_ALL = {"cli", "__main__"}

#: Packages of others that only these parts may import.
ONLY_IN: dict[str, set[str]] = {
    "zmq": {"net"},
    "msgpack": {"net"},
    "click": {"cli"},
    "gymnasium": {"collect", "zoo", "train", "cli"},
    "matplotlib": {"train"},
    "ray": {"launch"},
}

#: Parts that may import these packages of others and, besides them, the standard library alone.
NOTHING_BUT: dict[str, set[str]] = {
    "protocol": set(),
    "algo": {"torch", "numpy"},
}

#: Never imported by a module as it loads, only by the function that needs it: (part, package), "*" for every part.
ONLY_IN_FUNCTIONS = {("*", "matplotlib"), ("*", "ray"), ("algo", "numpy")}

#: Names that say nothing about what is inside.
NO_NAMES = {"utils", "helpers", "common", "misc"}


class Import(NamedTuple):
    """One imported module, as an absolute dotted name."""

    module: str
    line: int
    when_loaded: bool  # as the importing module loads: not in a function, not for typing alone


def violations(package: Path) -> list[str]:
    """All that breaks the table, one line each: ``data/spec.py:3 imports zrl.collect: data must not know collect``."""
    return [
        problem for path in sorted(package.rglob("*.py")) for problem in problems_of(path.relative_to(package), package)
    ]


def problems_of(path: Path, package: Path) -> Iterator[str]:
    part = path.parts[0].removesuffix(".py")
    if path.stem in NO_NAMES or part in NO_NAMES:
        yield f"{path}: a name that says nothing about what is inside"
    if path == Path("__init__.py"):
        return  # the public names come from anywhere
    if part not in MAY_IMPORT:
        yield f"{path}: {part} is not in the table of layers"
        return
    for found in imports_of(path, package):
        for problem in broken_by(part, found, package.name):
            yield f"{path}:{found.line} imports {found.module}: {problem}"


def broken_by(part: str, found: Import, ours: str) -> Iterator[str]:
    known = {part} | MAY_IMPORT[part] | (set() if part in OPEN_TO_ALL else OPEN_TO_ALL)
    top, _, rest = found.module.partition(".")
    if top == ours:
        target = rest.partition(".")[0]
        if not target:
            if part not in ABOVE_ALL:
                yield f"take the name from where it is defined, not from {ours} itself"
        elif target not in known:
            yield f"{part} must not know {target}"
        return
    if top in sys.stdlib_module_names:
        return
    if top in ONLY_IN and part not in ONLY_IN[top]:
        yield f"only in {', '.join(sorted(ONLY_IN[top]))}"
    if part in NOTHING_BUT and top not in NOTHING_BUT[part]:
        yield f"{part} uses nothing but {', '.join(sorted(NOTHING_BUT[part])) or 'the standard library'}"
    if found.when_loaded and ONLY_IN_FUNCTIONS & {("*", top), (part, top)}:
        yield "only inside the function that needs it"


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import of the module at `path` (relative to `package`), wherever it stands."""
    tree = ast.parse((package / path).read_text(), filename=str(path))
    here = (package.name, *path.parent.parts)
    late = {id(node) for scope in ast.walk(tree) if is_late(scope) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = modules_of(node, here, package)
        else:
            continue
        yield from (Import(module, node.lineno, id(node) not in late) for module in modules)


def is_late(node: ast.AST) -> bool:
    """Whether what stands inside `node` is not run as the module loads."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def modules_of(node: ast.ImportFrom, here: tuple[str, ...], package: Path) -> list[str]:
    """The modules that ``from … import a, b`` names, where `a` or `b` may be a module itself."""
    base = ".".join((*here[: len(here) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module
    assert base is not None
    if base != package.name:
        return [base]
    submodules = {p.name.removesuffix(".py") for p in package.iterdir()}
    return [f"{base}.{alias.name}" if alias.name in submodules else base for alias in node.names]


def test_imports_go_down_only() -> None:
    assert violations(PACKAGE) == []


def test_the_table_holds_no_cycle() -> None:
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError
    assert set(order) == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("data/spec.py", "from zrl.collect.actor import BaseActorModule", "data must not know collect"),
        ("data/spec.py", "import zrl.protocol.slots", "data must not know protocol"),
        ("protocol/slots.py", "import zrl.collect", "protocol must not know collect"),
        ("collect/envs.py", "from zrl import protocol", "collect must not know protocol"),
        ("collect/envs.py", "from ..protocol import slots", "collect must not know protocol"),
        ("collect/envs.py", "from .. import errors, protocol", "collect must not know protocol"),
        ("collect/envs.py", "def f():\n    import zrl.rollout", "collect must not know rollout"),
        ("collect/envs.py", "if TYPE_CHECKING:\n    import zrl.rollout", "collect must not know rollout"),
        ("collect/envs.py", "from zrl import BaseActorModule", "take the name from where it is defined"),
        ("rollout/same.py", "import zrl.algo", "rollout must not know algo"),
        ("rollout/same.py", "import zrl.zoo.actors", "rollout must not know zoo"),
        ("zoo/actors.py", "import zrl.train", "zoo must not know train"),
        ("zoo/actors.py", "import zrl.rollout.same", "zoo must not know rollout"),
        ("algo/returns.py", "import zrl.data.batch", "algo must not know data"),
        ("algo/returns.py", "import optree", "algo uses nothing but numpy, torch"),
        ("algo/returns.py", "import numpy as np", "only inside the function"),
        ("protocol/slots.py", "import numpy", "protocol uses nothing but the standard library"),
        ("train/loop.py", "import zrl.cli", "train must not know cli"),
        ("train/plots.py", "import matplotlib.pyplot as plt", "only inside the function"),
        ("train/plots.py", "class A:\n    import matplotlib", "only inside the function"),
        ("cli/run.py", "def f():\n    import matplotlib", "only in train"),
        ("launch/ray.py", "import ray", "only inside the function"),
        ("cli/launch.py", "def f():\n    import ray", "only in launch"),
        ("launch/slurm.py", "import zrl.cli", "launch must not know cli"),
        ("errors.py", "import zrl.config", "errors must not know config"),
        ("metrics.py", "from zrl.data.spec import FragmentSpec", "metrics must not know data"),
        ("nodes/worker.py", "import zmq.asyncio", "only in net"),
        ("nodes/worker.py", "from msgpack import packb", "only in net"),
        ("train/loop.py", "import click", "only in cli"),
        ("data/spec.py", "from gymnasium import spaces", "only in cli, collect, train, zoo"),
        ("data/utils.py", "", "a name that says nothing"),
        ("common/__init__.py", "", "a name that says nothing"),
        ("extras/__init__.py", "", "extras is not in the table"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, file: str, source: str, problem: str) -> None:
    found = violations(tree_with(tmp_path, file, source))
    assert found
    assert all((line.startswith(file) and problem in line) or "not in the table" in line for line in found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from zrl.cli import main"),
        (
            "data/spec.py",
            "from zrl.errors import ZrlError\nfrom zrl import config\nfrom . import ring\nimport numpy, torch",
        ),
        ("collect/envs.py", "from ..data.spec import FragmentSpec\nimport gymnasium\nimport zrl.metrics"),
        ("algo/returns.py", "import torch\nfrom zrl.algo.scan import scan\ndef f():\n    import numpy"),
        ("zoo/actors.py", "from zrl.collect.actor import BaseActorModule\nfrom zrl.algo import unroll"),
        ("train/plots.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes\ndef f():\n    import matplotlib"),
        ("net/codec.py", "import msgpack, zmq\nfrom zrl.protocol import messages"),
        ("cli/run.py", "import click, zrl\nfrom zrl.zoo import envs\nfrom zrl.train import loop"),
        ("__main__.py", "from zrl.cli import main"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    assert violations(tree_with(tmp_path, file, source)) == []


def tree_with(root: Path, file: str, source: str) -> Path:
    """A package named zrl with every part of the table as an empty module, and one file with `source`."""
    package = root / "zrl"
    package.mkdir()
    (package / "__init__.py").touch()
    for part in MAY_IMPORT:
        if not part.startswith("_"):
            target = package / f"{part}.py" if part in OPEN_TO_ALL else package / part / "__init__.py"
            target.parent.mkdir(exist_ok=True)
            target.touch()
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(source + "\n")
    return package
