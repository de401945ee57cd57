"""The order of the wings, the size of the method, and that an installed package holds all of it."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "itarflow"
# A wing imports only from wings of earlier lines.
ORDER = [
    {"runtime"},
    {"inverse", "codec", "text_encoder"},
    {"flow", "data"},
    {"presets", "convert", "denoisers"},
    {"pipeline", "plugins"},
    {"training", "evaluation"},
    {"commands"},
]
FLOOR = {wing: floor for floor, wings in enumerate(ORDER) for wing in wings}
FACES = {"__init__", "__main__", "denoise"}  # denoise: see its docstring
METHOD = [PACKAGE / "flow", PACKAGE / "inverse", PACKAGE / "denoisers" / "score.py", PACKAGE / "denoisers" / "ode.py"]


def imports(file: Path) -> list[str]:
    """The modules of the package that a file imports, also within functions and for types alone."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "itarflow":
            found += [f"itarflow.{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return [name for name in found if name.startswith("itarflow.")]


def wing_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files_of_the_method() -> list[Path]:
    return [file for place in METHOD for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]


def test_every_file_stands_in_a_wing():
    assert {wing_of(file) for file in PACKAGE.rglob("*.py")} == {*FLOOR, *FACES}


@pytest.mark.parametrize("wing", sorted(FLOOR))
def test_wings_import_from_wings_below_them_alone(wing):
    files = [file for file in PACKAGE.rglob("*.py") if wing_of(file) == wing]
    for file in files:
        for name in imports(file):
            other = name.split(".")[1]
            if other in ("__version__", wing):
                continue
            assert FLOOR[other] < FLOOR[wing], (
                f"{file.relative_to(ROOT)} imports {name}, but {wing} may import only from wings below it, and "
                f"{other} is none (CONTRIBUTING.md, How the code is laid out)"
            )


def test_the_method_is_small_and_knows_nothing_but_the_ground():
    files = files_of_the_method()
    rooms = [file for file in files if file.name != "__init__.py"]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert len(rooms) <= 13
    assert lines <= 3100
    for file in files:
        if file.parent.name == "denoisers":
            continue  # its face has diffusion models too
        for name in imports(file):
            assert name.split(".")[1] in {"runtime", "inverse", "flow"}, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_can_be_imported(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    modules = {file.relative_to(ROOT) for file in PACKAGE.rglob("*") if file.suffix in (".py", ".typed")}
    held = {file.relative_to(tmp_path / "installed") for file in (tmp_path / "installed" / "itarflow").rglob("*.*")}
    assert modules <= held
    script = (
        "import itarflow, pathlib; from itarflow import *; from itarflow.commands import cli; print(itarflow.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "installed" / "itarflow" / "__init__.py"
