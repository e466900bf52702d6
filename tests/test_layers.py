"""Who may import what: the layers of the project, read off the import statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "triton", "jsonargparse"}

LAYERS: dict[str, tuple[int, set[str]]] = {
    # module prefix: (height, heavy packages that it may import); imports go down or sideways.
    "s2srm.errors": (-2, set()),
    "s2srm.bounds": (-1, set()),
    "s2srm.config": (0, set()),
    "s2srm.process": (0, set()),
    "s2srm.launcher": (0, set()),
    "s2srm.watchdog": (0, set()),
    "s2srm.watchdog.hub": (1, set()),
    "s2srm.watchdog.guardian": (2, set()),
    "s2srm.watchdog.watch": (3, {"torch"}),
    "s2srm.paths": (0, set()),
    "s2srm.jsonl": (0, set()),
    "s2srm.outputs": (1, set()),
    "s2srm.validation": (2, set()),
    "s2srm.evaluation.config": (3, set()),
    "s2srm.distributed": (1, {"torch"}),
    "s2srm.packing": (1, {"torch"}),
    "s2srm.correlation": (1, {"torch"}),
    "s2srm.balance": (2, set()),
    "s2srm.checkpoint.files": (1, set()),
    "s2srm.runs": (2, set()),
    "s2srm.progress": (2, set()),
    "s2srm.metrics": (3, {"torch"}),
    "s2srm.data": (3, {"torch", "transformers", "datasets"}),
    "s2srm.worlds": (3, {"torch", "transformers"}),
    "s2srm.models": (3, {"torch", "transformers"}),
    "s2srm.engine": (4, {"torch", "transformers", "deepspeed"}),
    "s2srm.rollout": (4, {"torch", "transformers"}),
    "s2srm.evidence": (2, {"torch"}),
    "s2srm.guards": (5, {"torch", "transformers"}),
    "s2srm.checkpoint": (5, {"torch"}),
    "s2srm.rewards": (5, {"torch", "transformers"}),
    "s2srm.supervised": (6, {"torch", "transformers"}),
    "s2srm.ppo": (6, {"torch", "transformers"}),
    "s2srm.plan": (7, {"torch", "transformers", "datasets"}),
    "s2srm.evaluation": (8, {"torch", "transformers"}),
    "s2srm.report": (9, set()),
    "s2srm.commands": (10, {"torch", "transformers", "datasets", "jsonargparse"}),
    "s2srm.cli": (11, set()),
    "s2srm.__main__": (12, set()),
}
MATHS = (
    "s2srm.packing",
    "s2srm.ppo.kl",
    "s2srm.ppo.values",
    "s2srm.ppo.whitening",
    "s2srm.rewards.token",
)


def modules(folder: Path) -> list[tuple[str, Path]]:
    """(dotted name, path) of every module below a package's folder."""
    names = {
        path: ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
    }
    return [(name.removesuffix(".__init__"), path) for path, name in names.items()]


TRAINER = modules(ROOT / "s2srm")
KERNELS = modules(ROOT / "kernels" / "s2srm_kernels")


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Absolute names of everything a file imports; lazy=False: at its top level only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skip: set[ast.AST] = set()
    for node in ast.walk(tree):
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if type_checking or (inside_function and not lazy):
            skip.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> tuple[str, int, set[str]]:
    prefix = max(
        (p for p in LAYERS if module == p or module.startswith(f"{p}.")), key=len, default=None
    )
    assert prefix is not None, f"{module} belongs to no layer: add it to LAYERS"
    return prefix, *LAYERS[prefix]


@pytest.mark.parametrize(("module", "path"), TRAINER, ids=[m for m, _ in TRAINER])
def test_trainer_imports_downwards(module, path):
    if module == "s2srm":
        assert not [name for name in imports(path) if name.split(".")[0] in {*HEAVY, "s2srm"}]
        return
    prefix, height, allowed = layer(module)
    for name in imports(path):
        package = name.split(".")[0]
        if package in HEAVY:
            assert package in allowed, f"{module} imports {package}"
        elif package == "s2srm" and name != "s2srm.__version__":
            other, other_height, _ = layer(name)
            assert other == prefix or other_height < height, f"{module} imports {name}"


def kernel_layer(module: str) -> tuple[int, str]:
    """(height, name) of a module of s2srm_kernels; backends and operations do not meet."""
    name = module.removeprefix("s2srm_kernels").lstrip(".")
    if not name:
        return 3, "package"
    for backend in ("cpp", "triton", "lm_head.reference"):
        if name == backend or name.startswith(f"{backend}."):
            return 2, backend
    folder = name.split(".")[0]
    return {"ops": 2, "lm_head": 1}.get(folder, 0), folder if folder in ("ops", "lm_head") else ""


def kernel_imports() -> dict[str, set[str]]:
    """module -> the modules of s2srm_kernels that it imports anywhere."""
    names = {module for module, _ in KERNELS}
    found: dict[str, set[str]] = {}
    for module, path in KERNELS:
        found[module] = set()
        for name in imports(path):
            while name and name not in names:
                name = name.rpartition(".")[0]
            # Of `from s2srm_kernels.triton import launch` the package is not what is meant.
            if name and name != module and not module.startswith(f"{name}."):
                found[module].add(name)
    return found


@pytest.mark.parametrize("module", [m for m, _ in KERNELS])
def test_kernels_import_downwards(module):
    height, layer_name = kernel_layer(module)
    for name in kernel_imports()[module]:
        other, other_name = kernel_layer(name)
        assert other < height or other_name == layer_name, f"{module} imports {name}"


def test_kernels_import_in_no_circle():
    waiting = kernel_imports()
    while free := {module for module, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {module: needed for module, needed in waiting.items() if module not in free}
    assert not waiting, f"a circle among {sorted(waiting)}"


@pytest.mark.parametrize(("module", "path"), KERNELS, ids=[m for m, _ in KERNELS])
def test_kernels_know_torch_only(module, path):
    for name in imports(path):
        package = name.split(".")[0]
        assert package not in {"transformers", "datasets", "deepspeed", "s2srm"}, name
    for name in imports(path, lazy=False):
        if ".triton" not in module:
            assert name.split(".")[0] != "triton", f"{module}: triton is imported lazily"


def test_deepspeed_is_imported_in_the_engine_only_and_lazily():
    for module, path in TRAINER:
        if "deepspeed" in {name.split(".")[0] for name in imports(path)}:
            assert module.startswith("s2srm.engine."), module
        assert "deepspeed" not in {n.split(".")[0] for n in imports(path, lazy=False)}, module


def test_flash_attn_is_never_imported_at_module_level():
    for module, path in TRAINER:
        names = {name.split(".")[0] for name in imports(path, lazy=False)}
        assert not names & {"flash_attn", "flash_attn_interface"}, module


@pytest.mark.parametrize("module", MATHS)
def test_maths_needs_torch_and_the_kernels_only(module):
    path = dict(TRAINER)[module]
    packages = {name.split(".")[0] for name in imports(path)} & (HEAVY | {"s2srm_kernels"})
    assert packages <= {"torch", "s2srm_kernels"}


def test_only_the_head_meets_the_vocabulary_kernels():
    """One route to logits: the fused head."""
    users = {
        module
        for module, path in TRAINER
        if any(name.startswith("s2srm_kernels") and ".linear_" in name for name in imports(path))
    }
    assert users <= {"s2srm.models.head"}, users


def test_kernels_folder_is_no_package():
    """With an __init__.py it would shadow the PyPI package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
