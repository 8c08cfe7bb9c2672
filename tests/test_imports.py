"""The order of the packages: imports go one way, deferred ones and those for types included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynserve

ROOT = Path(dynserve.__file__).parent
GROUND = {
    "addresses",
    "child",
    "clock",
    "config",
    "errors",
    "hub",
    "log_limit",
    "model_files",
    "plane_tls",
    "open_files",
    "process",
    "sse",
    "streams",
    "tasks",
    "version",
    "tls_listener",
}
MAY_IMPORT: dict[str, set[str]] = {
    "wire": set(),
    "dialects": {"wire"},
    "text": {"wire", "dialects"},
    "api": {"wire", "dialects", "text"},
    "render": {"wire", "dialects", "text"},
    "routing": {"wire"},
    "transport": {"wire"},
    "executors": {"wire", "text", "dialects"},
    "server": set(),
    "frontend": {"wire", "text", "api", "render", "routing", "transport", "server"},
    "worker": {"wire", "dialects", "text", "render", "transport", "executors", "server"},
    "doctor": {"wire", "text", "executors"},
    "local": {"executors", "frontend", "server"},
    "deploy": {"executors", "frontend", "local", "server"},
    "cluster": {"transport", "executors", "frontend", "worker"},
}
APART = {
    "": {"cluster", "executors", "frontend", "routing", "worker"},
    "__main__": set[str](),
}  # `import dynserve` itself


def modules() -> dict[str, Path]:
    """Returns the file of each module by its dotted name below `dynserve` (empty for the package itself)."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> Iterator[str]:
    """Yields the modules of the package that a module names in an import statement, anywhere in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("dynserve.") for alias in node.names if alias.name.startswith("dynserve.")
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dynserve":
            below = (node.module or "").removeprefix("dynserve").removeprefix(".")
            for alias in node.names:
                inner = f"{below}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else below


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) not in APART))
def test_a_package_imports_only_packages_below_it(name: str) -> None:
    here = room(name)
    allowed = GROUND if here in GROUND else GROUND | MAY_IMPORT[here] | {here}
    above = {other for other in imported(name) if room(other) and room(other) not in allowed}
    assert not above


def test_imports_form_no_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in imported(name):
                visit(other, (*way, name))
            done.add(name)

    for name in MODULES:
        if name:  # the package's own names are loaded on first use, and for types
            visit(name, ())


@pytest.mark.parametrize("name", sorted(name for name in MODULES if room(name) == "routing"))
def test_routing_does_not_import_asyncio(name: str) -> None:
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "asyncio" not in names


@pytest.mark.parametrize("package", ["torch", "transformers", "tensorrt_llm", "fastapi", "starlette", "uvicorn"])
def test_heavy_packages_are_imported_only_where_allowed(package: str) -> None:
    homes = {
        "torch": ("executors.torch", "executors.trtllm", "local.make_model", "doctor.selftest.adapter"),
        "fastapi": ("frontend", "worker", "cluster"),
    }
    homes |= {"starlette": ("frontend", "server"), "uvicorn": ("server",)}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if package in {module.split(".")[0] for module in found}:
                assert name.startswith(homes.get(package, ("executors.trtllm",))), f"{name} imports {package}"
