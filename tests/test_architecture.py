"""The house rules of the source tree: imports run one way, the two wings do not know each other, files stay short."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lip_resnet"
LIP_WING = {"lip", "kernels", "logits", "pooling", "released", "blocks", "resnet", "densenet", "replace"}
FLOORS = [
    {"errors", "config", "recipe", "lip", "kernels", "logits", "released", "distributed", "seeding", "lifeline"},
    {"pooling", "blocks", "data", "weights", "optim", "metrics", "checkpoint", "interrupts", "objective"},
    {"runlog", "run_folder", "resnet", "densenet", "replace", "models", "engine", "nonfinite", "watchdog", "results"},
    {"fidelity", "paper", "run", "cli"},
    {"commands"},
]
# Inside a floor, only these: each is the plainer of the two.
WITHIN = {
    "config": {"errors"},
    "distributed": {"errors", "lifeline", "cli"},  # cli: for launch and ArgumentParser under their earlier names
    "recipe": {"config"},
    "lip": {"kernels"},
    "logits": {"kernels"},
    "blocks": {"pooling"},
    "objective": {"data"},
    "engine": {"nonfinite"},
    "data": {"checkpoint"},
    "weights": {"checkpoint"},
}


def _imports(path: Path) -> set[str]:
    """The package's own modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lip_resnet":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lip_resnet."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lip_resnet.")}
    return names


def _modules() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found[name] = found.get(name, set()) | _imports(path) - {name}
    return found


def test_every_module_has_a_floor():
    assert set(_modules()) <= set.union(*FLOORS)


def test_imports_run_downwards():
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    upwards = [
        f"{name} imports {other}"
        for name, imported in _modules().items()
        for other in imported
        if floor[other] >= floor[name] and other not in WITHIN.get(name, ())
    ]
    assert not upwards


def test_wings_do_not_know_each_other():
    crossing = [
        f"{name} imports {other}"
        for name, imported in _modules().items()
        for other in imported
        if (name in LIP_WING) != (other in LIP_WING) and name != "commands"
    ]
    assert not crossing


def test_nothing_imports_the_roof():
    roof = {"train", "eval", "scripts"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not roof & {module.split(".")[0] for module in modules}, path


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 350}
