"""The rules of the source tree (docs/architecture.md): imports run one way, wings do not mix, files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lip_resnet"
HALL = "hall"
HALL_FOLDERS = {"config"}
MAY_IMPORT = {
    HALL: set(),
    "ops": {HALL},
    "layers": {HALL, "ops"},
    "models": {HALL, "ops", "layers"},
    "data": {HALL},
    "evaluation": {HALL, "data"},
    "training": {HALL, "data", "evaluation"},
    "study": {HALL, "evaluation"},
    "insight": {HALL, "ops", "layers"},
    "detection": {HALL, "ops", "layers", "models", "data", "training", "evaluation", "insight"},
}
"""Wing -> the wings that its modules import. ``commands``, scripts and ``lip_resnet/__init__.py`` join all of them."""
COMMANDS = [ROOT / "train.py", ROOT / "eval.py", *(PACKAGE / "commands").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
CODE = [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]


def _wing(dotted: str) -> str:
    """lip_resnet.data.loaders -> data; a module at the root of the package belongs to the hall."""
    parts = dotted.split(".")
    in_hall = len(parts) < 2 or parts[1] in HALL_FOLDERS or not (PACKAGE / parts[1]).is_dir()
    return HALL if in_hall else parts[1]


def _imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                is_module = (ROOT / dotted.replace(".", "/")).with_suffix(".py").is_file()
                names.add(dotted if is_module or (ROOT / dotted.replace(".", "/")).is_dir() else node.module)
    return names


def _modules() -> dict[str, set[str]]:
    """Every module of the package but its ``__init__`` -> the modules of the package that it imports."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if dotted != "lip_resnet":
            modules[dotted] = {name for name in _imported(path) if name.split(".")[0] == "lip_resnet"}
    return modules


MODULES = _modules()


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_imports_between_wings_run_one_way(wing):
    crossing = [
        f"{module} imports {other}"
        for module, imported in MODULES.items()
        for other in imported
        if _wing(module) == wing and _wing(other) not in {wing, *MAY_IMPORT[wing]}
    ]
    assert not crossing


def test_every_wing_has_a_rule_and_a_description():
    wings = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert wings == {*MAY_IMPORT, *HALL_FOLDERS, "commands"} - {HALL}
    for wing in wings:
        assert ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8"))), wing


def test_ops_import_torch_alone():
    libraries = {name.split(".")[0] for path in (PACKAGE / "ops").rglob("*.py") for name in _imported(path)}
    assert not libraries & {"timm", "torchvision", "numpy", "pydantic", "yaml", "PIL"}


def test_no_module_imports_itself_in_a_circle():
    """Inside wings too; an import of a package is one of its ``__init__``."""
    waiting = {
        module: {name for name in imported if name in MODULES} - {module} for module, imported in MODULES.items()
    }
    while free := [module for module, imported in waiting.items() if not imported & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting


def test_nothing_imports_a_command():
    commands = {"train", "eval", "scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    for path in PACKAGE.rglob("*.py"):
        imported = _imported(path)
        assert not commands & {name.split(".")[0] for name in imported}, path
        if path.parent.name != "commands" and path != PACKAGE / "__init__.py":
            assert not any(name.startswith("lip_resnet.commands") for name in imported), path


def test_sizes():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert not {str(path): length for path, length in lengths.items() if length > 350}
    assert not {path: lengths[path] for path in lengths if path.parent.name == "commands" and lengths[path] > 120}
    assert len(list(PACKAGE.glob("*.py"))) <= 13
