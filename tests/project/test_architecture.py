"""The shape of the project: who may import whom, names that must not be taken, and the ways to
start training."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "selfnpo_fast"
KERNELS = ROOT / "kernels" / "selfnpo_kernels"
TRAIN = PACKAGE / "train.py"
CONFIG = ROOT / "configs" / "digits.yaml"

# A room is a module or folder directly in selfnpo_fast; it imports from lower floors only.
# `__init__` is what `from selfnpo_fast import <name>` sees: its imports are made late, and no room
# goes through it.
FLOORS = {
    1: {"runtime"},
    2: {"diffusion", "config", "scoring"},
    3: {"models", "data"},
    4: {"rollout", "negatives"},
    5: {"guidance"},
    6: {"training"},
    7: {"doctor", "train"},
    8: {"commands"},
    9: {"cli", "__init__"},
}

# Names that would hide somebody else's top-level module when a script in selfnpo_fast/ runs, its
# folder on sys.path.
TAKEN = set(sys.stdlib_module_names) | {
    *("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "safetensors"),
    *("datasets", "evaluate", "kernels", "tokenizers", "utils", "jsonargparse", "tensorboard", "tqdm", "yaml", "ninja"),
    *("numpy", "scipy", "PIL", "matplotlib", "xformers", "tests", "benchmarks", "selfnpo_kernels", "selfnpo_fast"),
}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported_modules(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, at any depth; `from a import b` gives `a.b`.

    `package` is the package that the file lies in, against which relative imports resolve.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def dotted_package(path: Path, top: Path) -> str:
    return ".".join([top.name, *path.relative_to(top).parent.parts])


def room_of(path: Path) -> str:
    """The module or package directly in selfnpo_fast that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


ROOMS = {room_of(path) for path in python_files(PACKAGE)}
FLOOR_OF = {room: number for number, rooms in FLOORS.items() for room in rooms}


def arrows(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) for every import from selfnpo_fast in a file."""
    for line, name in imported_modules(path, dotted_package(path, PACKAGE)):
        top, _, below = name.partition(".")
        if top == "selfnpo_fast":
            room = below.partition(".")[0]
            yield line, room if room in ROOMS | FLOOR_OF.keys() else "__init__"


def test_every_room_has_a_floor():
    unknown = sorted(ROOMS - FLOOR_OF.keys())
    assert not unknown, f"add {', '.join(unknown)} to FLOORS in tests/project/test_architecture.py"
    assert FLOOR_OF.keys() == ROOMS


def test_a_room_imports_from_lower_floors_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room_of(path)} may not import {room}"
        for path in python_files(PACKAGE)
        for line, room in sorted(set(arrows(path)))
        if room != room_of(path) and FLOOR_OF.get(room, 0) >= FLOOR_OF.get(room_of(path), len(FLOORS) + 1)
    ]
    assert not wrong, "imports against the floors:\n" + "\n".join(wrong)


ONLY_IMPORTED_BY = {"scoring": {"commands"}}


def test_scoring_is_imported_only_by_commands():
    """Measures judge what training makes: nothing that trains or draws may depend on them."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: only {', '.join(ONLY_IMPORTED_BY[room])} may import {room}"
        for path in python_files(PACKAGE)
        for line, room in arrows(path)
        if room in ONLY_IMPORTED_BY and room_of(path) not in ONLY_IMPORTED_BY[room] | {room}
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", KERNELS.name} | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files(KERNELS)
        for line, name in imported_modules(path, dotted_package(path, KERNELS))
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong, "selfnpo_kernels has to import alone:\n" + "\n".join(wrong)


def import_graph(top: Path) -> dict[str, set[str]]:
    """The modules of a package, and for each the modules of the package that it imports.

    Late imports count like those at the top of a file; none is exempt. The package's `__init__`,
    which Python runs before any module of the package, counts only where a module imports a name
    that `__init__` defines. The compiled extension `_cpp` imports nothing and is left out.
    """
    files = {}
    for path in python_files(top):
        name = f"{dotted_package(path, top)}.{path.stem}".removesuffix(".__init__")
        files[name] = path
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for _, imported in imported_modules(path, dotted_package(path, top)):
            if imported == f"{top.name}._cpp":
                continue
            while imported and imported not in files:
                imported = imported.rpartition(".")[0]
            if imported:
                graph[name].add(imported)
    return graph


def test_no_kernel_modules_import_each_other_in_a_circle():
    try:
        graphlib.TopologicalSorter(import_graph(KERNELS)).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("late", ["from top import a", "import top.a", "importlib.import_module('top.a')"])
def test_a_circle_of_late_imports_is_found(tmp_path, late):
    top = tmp_path / "top"
    top.mkdir()
    (top / "__init__.py").write_text("from top import b\n")
    (top / "a.py").write_text("from top.b import name\n")
    (top / "b.py").write_text(f"import importlib\n\ndef name():\n    {late}\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph(top)).prepare()


def test_reader_of_imports_sees_every_form(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def late():\n    import i\n    importlib.import_module('j.k')\n"
    )
    assert list(imported_modules(source, "top.sub")) == [
        (1, "a.b"),
        (2, "d.e"),
        (3, "top.sub.f"),
        (4, "top.g.h"),
        (6, "i"),
        (7, "j.k"),
    ]


def test_no_module_takes_a_name_of_others():
    assert not sorted(ROOMS & TAKEN - {"__init__"})


@pytest.mark.parametrize("folder", ["tests", "kernels", "benchmarks", "configs"])
def test_folder_is_no_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; a failure shows what the command wrote."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{done.args} left with {done.returncode}\n{said}"
    return done


def test_importing_the_package_is_light():
    heavy = ("deepspeed", "gradio", "bitsandbytes")
    done = run(sys.executable, "-c", f"import sys, selfnpo_fast; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"


# What transformers' integration reads off the Hugging Face package when its release is one that it
# accepts.
STAND_IN = """
class _Any:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else None

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Any
"""

PROBE = """
import importlib.util, json, sys
import diffusers, transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel
found = importlib.util.find_spec("kernels")
print(json.dumps({
    "diffusers": diffusers.utils.is_kernels_available(),
    "transformers": transformers.utils.is_kernels_available(),
    "origin": found and found.origin,
    "ours": "selfnpo_kernels" in sys.modules,
}))
"""


def install_stand_in(site: Path, version: str) -> Path:
    """A package with the name of Hugging Face's `kernels`, in the given release."""
    for package in ("kernels", "kernels/layer"):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text(STAND_IN)
    (site / "kernels" / "layer" / "mode.py").write_text(STAND_IN)
    metadata = site / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return site / "kernels" / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["none", "accepted by transformers", "refused by transformers"])
def test_hugging_face_libraries_import_from_the_repository_root(installed, tmp_path):
    """Our folder `kernels` must be taken for nobody's package: not found without theirs, not in its
    way with it."""
    present = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    assert "kernels" not in present, "this environment holds the Hugging Face package `kernels`: uninstall it"
    env, origin, accepted = {}, None, installed.startswith("accepted")
    if installed != "none":
        from transformers.utils.import_utils import KERNELS_MIN_VERSION

        origin = str(install_stand_in(tmp_path, KERNELS_MIN_VERSION if accepted else "0.1.0"))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    found = json.loads(run(sys.executable, "-c", PROBE, **env).stdout.splitlines()[-1])
    assert found == {"diffusers": installed != "none", "transformers": accepted, "origin": origin, "ours": False}


def printed_config(*command: str | Path, **kwargs) -> dict:
    """The YAML on standard output, and nothing else there, of a command that ends in
    `--print_config`."""
    values = yaml.safe_load(run(*command, "--config", CONFIG, "--print_config", **kwargs).stdout)
    assert isinstance(values, dict)
    assert "rollout" in values
    return values


def tool(name: str) -> Path:
    """A console script of the environment that the tests run in."""
    path = Path(sys.executable).parent / name
    assert path.exists(), f"{path} is missing: the tests run in the environment that `make setup` makes"
    return path


@pytest.fixture(scope="module")
def config_by_script() -> dict:
    return printed_config(sys.executable, "selfnpo_fast/train.py")


STARTS = {
    "script_from_elsewhere": lambda: (sys.executable, TRAIN),
    "module": lambda: (sys.executable, "-m", "selfnpo_fast.train"),
    "deepspeed_script": lambda: (tool("deepspeed"), "--quiet", "--num_gpus", "1", "selfnpo_fast/train.py"),
    "deepspeed_module": lambda: (tool("deepspeed"), "--quiet", "--num_gpus", "1", "--module", "selfnpo_fast.train"),
    "selfnpo_train": lambda: (tool("selfnpo"), "train"),
}


SLOW_STARTS = ("deepspeed_script", "module", "script_from_elsewhere")


@pytest.mark.parametrize("start", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_STARTS else n for n in STARTS])
def test_training_starts_every_way_with_one_config(start, config_by_script, tmp_path):
    cwd = tmp_path if start == "script_from_elsewhere" else ROOT
    assert printed_config(*STARTS[start](), cwd=cwd) == config_by_script


def test_train_takes_its_folder_off_the_path_first():
    """Until it has, every import is a chance for config.py or models/ to be taken for somebody's
    top-level module.

    The standard library is safe: no module of ours has a name of its.
    """
    for statement in ast.parse(TRAIN.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
            assert module.partition(".")[0] in sys.stdlib_module_names, f"train.py:{statement.lineno} imports {module}"
        elif "sys.path" in ast.unparse(statement):
            return
    pytest.fail("train.py never touches sys.path")


def test_train_imports_nothing_from_its_own_folder(tmp_path, config_by_script):
    """A copy of the script stands among files that fail when they are imported."""
    script = shutil.copy(TRAIN, tmp_path / "train.py")
    for name in ("torch", "config", "datasets", "evaluate", "utils", "yaml", "jsonargparse", "schedule", "dataclasses"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} came from the folder of the script')\n")
    assert printed_config(sys.executable, script) == config_by_script


# --- what only models/ and diffusion/ may name

FAMILY_WORDS = re.compile(r"\b(unet|UNet2DConditionModel|alphas_cumprod|encoder_hid_proj)\b")


def test_no_family_is_named_outside_models_and_diffusion():
    """Everything else asks models/base.py's Family and Adapter (docs/adding_a_model.md)."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files(PACKAGE)
        if room_of(path) not in ("models", "diffusion")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILY_WORDS.search(line)
    ]
    assert not wrong, "\n".join(wrong)
