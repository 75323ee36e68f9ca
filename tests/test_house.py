"""The rules of the house: imports, sizes, forbidden calls, packaging. Each rule is shown to be able to fail."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "vader_nodes"
LIBRARY = "vader_backend"
MAX_LINES, MAX_FUNCTION = 400, 60
COMFY = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "execution")


@dataclass(frozen=True)
class Rule:
    """Modules under `who` must not reach, even through others, modules under `never`, except those under `but`."""

    who: tuple[str, ...]
    never: tuple[str, ...]
    but: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.who)} must not reach {', '.join(self.never)}"


def _lib(*names: str) -> tuple[str, ...]:
    return tuple(f"{LIBRARY}.{name}" for name in names)


BASE = _lib("models.base", "models._blocks")
LEAVES = _lib("config", "rng", "registry")
RULES = (
    Rule(LEAVES, (LIBRARY,), LEAVES),
    Rule(_lib("types"), (LIBRARY,), (*LEAVES, *_lib("types"))),
    Rule(_lib("checkpoint"), (LIBRARY,), (*LEAVES, *_lib("checkpoint"))),
    Rule(_lib("process"), (LIBRARY,), (*LEAVES, *_lib("types", "process"))),
    Rule(_lib("sampling"), (LIBRARY,), (*LEAVES, *_lib("types", "process", "sampling"))),
    Rule(_lib("models"), _lib("rewards", "objectives", "trainer", "sampling", "memory", "align")),
    Rule(_lib("rewards"), _lib("models", "objectives", "trainer", "process", "sampling", "memory", "align")),
    Rule(_lib("memory"), _lib("models", "rewards", "objectives", "trainer", "sampling"), BASE),
    Rule(_lib("objectives"), _lib("models", "rewards", "trainer", "align"), (*BASE, *_lib("rewards.base"))),
    Rule(
        _lib("trainer"),
        _lib("objectives", "models", "rewards", "memory", "align"),
        (*BASE, *_lib("objectives.base", "rewards.base")),
    ),
    Rule((LIBRARY,), ("nodes", "tools", *COMFY)),
    Rule(("nodes",), ("tools",)),
)
ONLY_HOST = "nodes.host"  # the one module that names ComfyUI's modules


# --- reading imports -------------------------------------------------------------------------


def imports(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports, relative ones made absolute within the package; «a.b» for `from a import b`.

    module: dotted name within the package; a package ends with ".__init__".
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".")[: -node.level] if node.level else []
            base = [*home, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """What each module imports: modules of the package by their own names, others as written.

    Importing a.b also runs a: that is an edge to "a.__init__", while "a" stands for importing the package itself.
    """
    known = {name.removesuffix(".__init__") for name in sources}
    result: dict[str, set[str]] = {}
    for module, source in sources.items():
        edges = result[module] = set()
        for name in imports(module, source):
            parts = name.split(".")
            heads = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            inside = [head for head in heads if head in known]
            edges.update([*inside[:1], *(f"{head}.__init__" for head in inside[1:])] or [name])
        if module.endswith(".__init__"):
            result[module.removesuffix(".__init__")] = {module}
    return result


def reached(start: str, edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Everything that a module imports directly or through others, each with the path to it."""
    paths: dict[str, str] = {}
    waiting = [(name, f"{start} -> {name}") for name in edges[start]]
    while waiting:
        name, path = waiting.pop()
        if name not in paths:
            paths[name] = path
            waiting += [(following, f"{path} -> {following}") for following in edges.get(name, ())]
    return paths


def import_faults(sources: Mapping[str, str], rules: Iterable[Rule] = RULES) -> list[str]:
    edges = graph(sources)
    return [
        f"{rule}: {path}"
        for rule in rules
        for module in edges
        if under(module, rule.who)
        for name, path in reached(module, edges).items()
        if under(name, rule.never) and not under(name, rule.but) and not name.endswith(".__init__")
    ]


def absolute_faults(module: str, source: str) -> list[str]:
    """Imports of the package by its absolute name, and ComfyUI's modules outside the host."""
    faults = []
    own = (PACKAGE, LIBRARY, "nodes")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults += [f"{module} imports {name}: use a relative import" for name in names if under(name, own)]
            if module != ONLY_HOST:
                faults += [f"{module} imports {name}: only {ONLY_HOST} may" for name in names if under(name, COMFY)]
    return faults


# --- sizes and calls -------------------------------------------------------------------------


def size_faults(module: str, source: str) -> list[str]:
    lines = source.count("\n")
    faults = [f"{module} has {lines} lines; at most {MAX_LINES}"] if lines > MAX_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                faults.append(f"{module}.{node.name} has {length} lines; at most {MAX_FUNCTION}")
    return faults


FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "torch.save", "os.system", "joblib.load"}
FORBIDDEN_VALUES = {("weights_only", False), ("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}


def call_faults(module: str, source: str) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in FORBIDDEN_CALLS:
            faults.append(f"{module}:{node.lineno} calls {name}")
        if name == "torch.load" and ("weights_only", True) not in given:
            faults.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
        faults += [f"{module}:{node.lineno} says {k}={v!r}" for k, v in given & FORBIDDEN_VALUES]
    return faults


# --- the repository --------------------------------------------------------------------------


def python_files(root: Path, *folders: str) -> dict[str, str]:
    """Sources by dotted name below the root: the given folders, and the files of the root itself."""
    paths = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def package(root: Path) -> dict[str, str]:
    return python_files(root, LIBRARY, "nodes")


@pytest.fixture(scope="module")
def everything(root: Path) -> dict[str, str]:
    return python_files(root, LIBRARY, "nodes", "tools", "tests", "benchmarks")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_import_rules_hold(package: dict[str, str]) -> None:
    assert f"{LIBRARY}.process" in package
    assert not import_faults(package)


def test_imports_are_relative_and_only_the_host_knows_comfyui(package: dict[str, str]) -> None:
    assert not [fault for module, source in package.items() for fault in absolute_faults(module, source)]


def test_no_file_and_no_function_is_too_long(everything: dict[str, str]) -> None:
    assert not [fault for module, source in everything.items() for fault in size_faults(module, source)]


def test_no_forbidden_calls(package: dict[str, str]) -> None:
    assert not [fault for module, source in package.items() for fault in call_faults(module, source)]


def test_package_list_equals_the_folders(root: Path, project: dict[str, Any]) -> None:
    folders = {path.parent for top in (LIBRARY, "nodes") for path in (root / top).rglob("*.py")} | {root}
    names = {".".join([PACKAGE, *folder.relative_to(root).parts]) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == names
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_package_data_covers_every_file_that_is_not_python(root: Path, project: dict[str, Any]) -> None:
    listed: set[Path] = set()
    for name, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = root.joinpath(*name.split(".")[1:])
        listed |= {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = {
        path
        for top in (LIBRARY, "nodes", "workflows")
        for path in (root / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    assert root / LIBRARY / "prompts" / "activities.txt" in kept
    assert not kept - listed


def test_prompt_files_are_not_empty(root: Path) -> None:
    files = list((root / LIBRARY / "prompts").glob("*.txt"))
    assert files
    assert not [path.name for path in files if not path.read_text(encoding="utf-8").strip()]


def test_versions_agree(root: Path, project: dict[str, Any]) -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["project"]["version"]


def requirements(text: str) -> dict[str, str]:
    """Name -> what follows it, for every line that is not a comment."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    parts = (re.match(r"([A-Za-z0-9._-]+)(.*)", line) for line in lines if line)
    return {match[1].lower().replace("_", "-"): match[2].strip() for match in parts if match}


def requirement_faults(shipped: dict[str, str], project: dict[str, str]) -> list[str]:
    """requirements.txt for ComfyUI: lower bounds as in pyproject.toml, and nothing that ComfyUI itself brings."""
    faults = [f"{n}{bound}: only a lower bound" for n, bound in shipped.items() if not re.fullmatch(r">=[\d.]+", bound)]
    faults += [f"{n} is ComfyUI's own" for n in shipped if n in ("torch", "numpy", "torchvision", "torchaudio")]
    return faults + [
        f"{n}{bound} differs from pyproject.toml" for n, bound in shipped.items() if project.get(n) != bound
    ]


def test_requirements_never_downgrade(root: Path, project: dict[str, Any]) -> None:
    stated = requirements("\n".join(project["project"]["dependencies"]))
    shipped = requirements((root / "requirements.txt").read_text(encoding="utf-8"))
    assert not requirement_faults(shipped, stated)
    assert set(stated) - set(shipped) == {"torch", "numpy"}


def test_constraints_pin_every_dependency(root: Path, project: dict[str, Any]) -> None:
    pinned = requirements((root / "constraints.txt").read_text(encoding="utf-8"))
    assert all(bound.startswith("==") for bound in pinned.values())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    assert not set(requirements("\n".join(wanted))) - set(pinned)


# --- each rule can fail ----------------------------------------------------------------------

CLEAN = {
    "vader_backend.__init__": "",
    "vader_backend.config": "import math",
    "vader_backend.types": "import torch",
    "vader_backend.process": "from .types import VideoSpec",
    "vader_backend.sampling": "from .process import Process",
    "vader_backend.models.__init__": "",
    "vader_backend.models.base": "from ..process import Process",
    "vader_backend.models.wan": "from .base import VideoModel",
    "vader_backend.rewards.__init__": "",
    "vader_backend.rewards.base": "from ..types import FrameSpec",
    "vader_backend.rewards.hps": "from .base import Reward\nfrom . import base",
    "vader_backend.objectives.__init__": "",
    "vader_backend.objectives.base": "from ..types import Rollout",
    "vader_backend.objectives.vader": "from ..models.base import M\nfrom ..rewards.base import R",
    "vader_backend.memory.__init__": "",
    "vader_backend.memory.tiling": "from ..models.base import VideoModel",
    "vader_backend.trainer": "from .objectives.base import Objective",
    "vader_backend.helper": "from .models.wan import Wan\nfrom .objectives.vader import Vader",
    "nodes.__init__": "from . import host",
    "nodes.host": "import torch",
}


def test_clean_sources_have_no_faults() -> None:
    assert not import_faults(CLEAN)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vader_backend.config", "from .types import VideoSpec"),
        ("vader_backend.types", "from .process import Process"),
        ("vader_backend.process", "from .models.base import VideoModel"),
        ("vader_backend.process", "from .sampling import step"),
        ("vader_backend.sampling", "from . import models"),
        ("vader_backend.models.wan", "from ..rewards.base import Reward"),
        ("vader_backend.models.base", "from ..sampling import step"),
        ("vader_backend.models.wan", "def f():\n    from ..trainer import train"),
        ("vader_backend.rewards.hps", "from ..models.base import VideoModel"),
        ("vader_backend.rewards.base", "from ..process import Process"),
        ("vader_backend.rewards.hps", "from .. import models"),
        ("vader_backend.memory.tiling", "from ..models.wan import Wan"),
        ("vader_backend.memory.tiling", "from ..models import wan"),
        ("vader_backend.memory.tiling", "from ..rewards.base import Reward"),
        ("vader_backend.objectives.vader", "from ..models.wan import Wan"),
        ("vader_backend.objectives.vader", "from ..rewards import hps"),
        ("vader_backend.objectives.vader", "from ..helper import thing"),
        ("vader_backend.objectives.base", "from ..trainer import train"),
        ("vader_backend.trainer", "from .objectives.vader import Vader"),
        ("vader_backend.trainer", "from .objectives import vader"),
        ("vader_backend.trainer", "from . import helper"),
        ("vader_backend.trainer", "from .rewards.hps import build"),
        ("vader_backend.helper", "import comfy.utils"),
        ("vader_backend.helper", "from ..nodes import host"),
        ("vader_backend.types", "if True:\n    import folder_paths"),
    ],
)
def test_import_rules_can_fail(module: str, source: str) -> None:
    assert import_faults({**CLEAN, module: source})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nodes.train", "from vader_nodes.vader_backend import config"),
        ("nodes.train", "import vader_backend.config"),
        ("nodes.train", "from nodes.host import x"),
        ("nodes.train", "def f():\n    import comfy.utils"),
        ("nodes.save", "from server import PromptServer"),
        ("__init__", "import folder_paths"),
    ],
)
def test_absolute_imports_are_found(module: str, source: str) -> None:
    assert absolute_faults(module, source)


def test_the_host_may_name_comfyui() -> None:
    assert not absolute_faults(ONLY_HOST, "def f():\n    import comfy.utils\n    import folder_paths")
    assert not absolute_faults("nodes.train", "import torch\nfrom .host import x\nfrom .. import y")


def test_sizes_are_measured() -> None:
    assert not size_faults("m", "x = 1\n" * MAX_LINES)
    assert size_faults("m", "x = 1\n" * (MAX_LINES + 1))
    assert not size_faults("m", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1))
    assert size_faults("m", "def f():\n" + "    x = 1\n" * MAX_FUNCTION)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.save(x, p)",
        "eval('1')",
        "exec('1')",
        "pickle.load(f)",
        "pickle.loads(b)",
        "C.from_pretrained(p, trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_forbidden_calls_are_found(source: str) -> None:
    assert call_faults("m", source)
    assert not call_faults("m", "model.eval()\ntorch.load(p, weights_only=True)\nsubprocess.run(['ls'])")


def test_bad_requirements_are_found() -> None:
    stated = {"torch": ">=2.4", "peft": ">=0.17"}
    assert not requirement_faults({"peft": ">=0.17"}, stated)
    for shipped in ({"peft": "==0.17"}, {"peft": ">=0.17,<1"}, {"peft": ""}, {"torch": ">=2.4"}, {"peft": ">=0.18"}):
        assert requirement_faults(shipped, stated), shipped
