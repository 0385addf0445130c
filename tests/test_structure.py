"""The rules of ARCHITECTURE.md that a machine can check."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("server", "engine", "kernels", "loadtest")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "server": {"server", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
    "loadtest": {"loadtest"},  # HTTP only; its microbenchmarks look inside
    "loadtest/micro": {"loadtest", "server", "engine", "kernels"},
    "loadtest/gpu": {"loadtest", "engine", "kernels"},
}
FROM_ENGINE = {
    "engine.types",
    "engine.grammar",
    "engine.grammar_compiler",
    "engine.ipc.messages",
    "engine.config",
    "engine.log_lines",
    "engine.client.client",
    "engine.client.supervisor",
}
# Rooms and the modules beside them, from the ground up: each line may import from the lines above it and from itself.
ROOMS = {
    "engine": (
        "grammar grammar_compiler types config arrays log_lines lazy_import circuit_breaker faults memory_errors",
        "ipc",
        "client",
        "kv_cache",
        "batch",
        "attention",
        "quantization",
        "models",
        "structured",
        "sampling",
        "speculation",
        "scheduling",
        "loading",
        "planning",
        "runner",
        "engine",
        "build",
        "process replay",
        "compression",
        "training",
    ),
    "server": (
        "version complain config errors off_loop json_encoding",
        "settings",
        "protocol",
        "text",
        "structured",
        "parsing",
        "training",
        "telemetry",
        "monitoring",
        "generation",
        "http",
        "offline",
        "state state_watch",
        "api",
        "app",
        "cli",
    ),
    "loadtest": (
        "extra",
        "workload",
        "client",
        "report",
        "scenarios",
        "compare",
        "rollout containers",
        "operation",
        "planning",
        "speculation searching",
        "arguments",
        "cli",
        "__main__ selfcost agreement",
        "micro",
        "gpu",
    ),
    "kernels": ("layout configs", "reference", "torch_cpu numba triton"),
    "kernels/numba": ("core", "kernel_cache", "packing", "ops", "program", "compile_usual"),
    "kernels/triton": ("compat configs kv_codes", "attention sampling quantized", "layers"),
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
MAX_PARAMETERS = 7
FORBIDDEN_NAMES = re.compile(r"^(utils?|helpers?|common|misc|legacy|new_.*|.*_v2|.*_old)\.py$")


def _imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module


def _package(path: Path) -> str:
    relative = path.relative_to(ROOT)
    inner = "/".join(relative.parts[:2])
    return inner if inner in MAY_IMPORT else relative.parts[0]


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    for _, name in _imports(path):
        package = name.split(".")[0]
        if package in PACKAGES:
            assert package in MAY_IMPORT[_package(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_imported_from_above(package: str) -> None:
    """Imports inside functions and for types count too: they are how a way back begins."""
    level = {room: i for i, line in enumerate(ROOMS[package]) for room in line.split()}
    folder = ROOT / package
    prefix = package.replace("/", ".") + "."
    for path in folder.rglob("*.py"):
        if path.parent == folder and path.stem == "__init__":
            continue
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        assert room in level, f"{package}/{room} is not in the order of rooms"
        for _, name in _imports(path):
            if name.startswith(prefix):
                other = name.removeprefix(prefix).split(".")[0]
                are_files = (folder / f"{other}.py").is_file() and (folder / f"{room}.py").is_file()
                is_below = level[other] < level[room] or (level[other] == level[room] and are_files)
                assert other == room or is_below, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_says_what_it_owns(package: str) -> None:
    """`kernels/__init__.py` is the exception: see `test_kernels_package_stays_empty`."""
    for path in (ROOT / package).rglob("__init__.py"):
        if path.parent != ROOT / "kernels":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.parent.relative_to(ROOT)} says nothing"


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        _module(path): {_module_of(name) for _, name in _imports(path)} - {None}
        for path in SOURCES
        if path.stem != "__init__"
    }
    TopologicalSorter(graph).prepare()


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _module_of(name: str) -> str | None:
    """The module of the project that an import names; None for what is not a file of it."""
    return name if (ROOT / (name.replace(".", "/") + ".py")).is_file() else None


def test_the_server_knows_only_the_engine_s_border() -> None:
    """The plan and doctor commands (`server/cli`) run the engine's code themselves, inside functions."""
    for path in (ROOT / "server").rglob("*.py"):
        for _, name in _imports(path):
            if name.split(".")[0] == "engine" and path.parent.name != "cli":
                assert name in FROM_ENGINE, f"{path.name} imports {name}"


def test_the_server_starts_without_torch_and_transformers() -> None:
    code = "import sys, server.cli.serve, server.app; print(*{'torch', 'transformers', 'triton'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert not FORBIDDEN_NAMES.match(path.name), f"{path.name} says nothing about what is in it"
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for function in _functions(path):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        is_kernel = any("jit" in one or one.startswith("kernel(") for one in decorators)
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        assert num_lines <= (MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES), f"{function.name}: {num_lines}"
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        num_parameters = len([name for name in names if name not in ("self", "cls")])
        if _package(path) not in ("kernels", "loadtest/micro"):
            assert num_parameters <= MAX_PARAMETERS, f"{function.name} has {num_parameters} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_trusted(path: Path) -> None:
    text = path.read_text()
    for _, name in _imports(path):
        module = name.split(".")[0]
        if (
            module == "pickle" and path.name == "kernel_cache.py"
        ):  # Numba's form of compiled code: as trusted as code is
            continue
        assert module not in {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert "trust_remote_code=True" not in text
    assert "weights_only=False" not in text
    assert not re.search(r"(?<![\w.])(eval|exec)\(", text)


def _registries() -> Iterator[tuple[str, str, str]]:
    for path in (*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                for value in node.value.values:
                    is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
                    if is_text and re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", value.value):
                        yield path.name, *value.value.split(":")


def test_registries_resolve() -> None:
    entries = list(_registries())
    assert len(entries) >= 8
    for file, module, name in entries:
        assert getattr(importlib.import_module(module), name, None) is not None, f"{file}: {module}:{name}"


@pytest.mark.parametrize("package", ["server", "engine", "kernels"])
def test_tests_lie_where_the_code_does(package: str) -> None:
    """Offline compilation (`kernels/aot`) is a way to test, and no room."""
    tests = ROOT / "tests"
    for path in (tests / package).rglob("test_*.py"):
        room = path.parent.relative_to(tests)
        assert (ROOT / room).is_dir() or room.name == "aot", f"there is no {room}"


@pytest.mark.parametrize("package", ["server", "engine", "kernels", "loadtest", "tests"])
def test_what_docstrings_and_comments_name_is_there(package: str) -> None:
    """`engine.sampling.gumbel` is a module, `engine.sampling.gumbel.GumbelRace` something that it has."""
    for path in (ROOT / package).rglob("*.py"):
        for text in _words_for_people(path):
            for name in re.findall(r"\b(?:engine|kernels|loadtest)(?:\.[A-Za-z_]\w*)+", text):
                assert _is_there(name), f"{path.relative_to(ROOT)} names {name}"


def _words_for_people(path: Path) -> Iterator[str]:
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _is_there(name: str) -> bool:
    place = ROOT
    parts = name.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        place /= f"{parts.pop(0)}.py"
    file = place / "__init__.py" if place.is_dir() else place
    return not parts or (file.is_file() and re.search(rf"\b{parts[0]}\b", file.read_text()) is not None)


def test_kernels_package_stays_empty() -> None:
    """transformers imports any package of this name."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
