"""The rule of the layout: a file imports only from rows above its own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.stock import run_without_package

import diffusers_vae

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_vae"

# Files and chapters of one row never see each other.
ROWS = [
    {"messages", "fields"},
    {"storage", "untrusted", "silence", "presets"},
    {"processes", "settings", "images"},
    {"models", "losses", "data"},
    {"latents", "engine", "pipelines"},
    {"evaluation"},
    {"reports"},
    {"hub"},
    {"tasks"},
    {"cli"},
    {"training"},
]
ALLOWED_ONLY_IN = {
    "accelerate": {"tasks", "engine", "cli"},
    "filelock": {"storage", "processes"},
    "yaml": {"settings"},
    "huggingface_hub": {"hub", "data", "models"},
}


def files():
    found = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "training").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def unit_of(file: str) -> str:
    """The name in ROWS: models for diffusers_vae/models/vae.py, training for training/train_vae.py."""
    parts = Path(file).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def imports(file: str, source: str) -> set[str]:
    """Full dotted names of everything that a file imports, wherever in it: for `from a import b`, a.b."""
    here = Path(file).with_suffix("").parts  # for `from .` in a module, the package is one level up
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += [node.module] if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def violations(file: str, source: str) -> list[str]:
    """What is wrong with the imports of a file, one sentence each."""
    unit, found = unit_of(file), []
    row_of = {name: row for row, names in enumerate(ROWS) for name in names}
    if unit not in row_of:
        return [f"{file} is in no row of the layout"]
    for name in sorted(imports(file, source)):
        top, _, rest = name.partition(".")
        if unit not in ALLOWED_ONLY_IN.get(top, {unit}):
            found.append(f"{file} imports {top}, which only {sorted(ALLOWED_ONLY_IN[top])} may")
        if top not in (PACKAGE, "training"):
            continue
        target = rest.partition(".")[0] if top == PACKAGE else top
        public = unit == "training" and target not in row_of  # a script may use the names of __init__.py
        if target != unit and not public and row_of.get(target, len(ROWS)) >= row_of[unit]:
            found.append(f"{file} imports {name}, which is not in a row above")
    return found


@pytest.mark.parametrize("file", [file for file in files() if file != f"{PACKAGE}/__init__.py"])
def test_imports_only_from_rows_above(file):
    assert violations(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("diffusers_vae/models/vae.py", "from ..images import to_uint8\nfrom .mlp import MLPVAE", True),
        ("diffusers_vae/models/vae.py", "from ..losses.objective import Gaussian", False),
        ("diffusers_vae/models/__init__.py", "from .vae import VAE", True),
        ("diffusers_vae/models/__init__.py", "from .. import losses", False),
        ("diffusers_vae/losses/objective.py", "def f():\n    from ..models import VAE", False),
        ("diffusers_vae/losses/objective.py", "import diffusers_vae.models.vae", False),
        ("diffusers_vae/losses/objective.py", "from .. import VAE", False),
        ("diffusers_vae/losses/objective.py", "from diffusers_vae import __version__", False),
        ("diffusers_vae/images/files.py", "from ..data.sources import Digits", False),
        (
            "diffusers_vae/tasks/autoencoder.py",
            "from accelerate import Accelerator\nfrom ..evaluation import evaluate",
            True,
        ),
        ("diffusers_vae/evaluation/evaluate.py", "import accelerate.utils", False),
        ("diffusers_vae/tasks/autoencoder.py", "from huggingface_hub import upload_folder", False),
        ("diffusers_vae/hub/push.py", "from ..tasks.autoencoder import TrainConfig", False),
        ("diffusers_vae/tasks/autoencoder.py", "import training.train_vae", False),
        ("training/train_vae.py", "from diffusers_vae.cli.parser import parse\nfrom diffusers_vae import VAE", True),
        ("training/train_vae.py", "from diffusers_vae.cli import main", True),
        ("diffusers_vae/pipelines.py", "from .models import VAE", True),
        ("diffusers_vae/pipelines.py", "from .hub import push", False),
        ("diffusers_vae/pipelines.py", "from accelerate.hooks import ModelHook", False),
        ("diffusers_vae/utils.py", "", False),
    ],
)
def test_the_rule_tells_right_from_wrong(file, source, allowed):
    assert (violations(file, source) == []) == allowed


def imported_files(file: str, source: str) -> set[str]:
    """Files of the package that a file imports, wherever in it."""
    found = set()
    for name in imports(file, source):
        parts = name.split(".")
        for path in ("/".join(parts[:length]) for length in (len(parts), len(parts) - 1)):
            candidates = [path for path in (f"{path}.py", f"{path}/__init__.py") if (ROOT / path).is_file()]
            if path.startswith(f"{PACKAGE}/") and candidates:
                found.add(candidates[0])
                break
    return found - {file}


def circle(sources: dict[str, str]) -> list[str]:
    """Files that import each other in a circle, or none."""
    graph = {file: imported_files(file, source) & sources.keys() for file, source in sources.items()}
    while ends := [file for file, targets in graph.items() if not targets]:
        graph = {file: targets - set(ends) for file, targets in graph.items() if file not in ends}
    return sorted(graph)


def sources() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in files() if not file.startswith("training/")}


def test_no_files_import_each_other():
    assert circle(sources()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from .encode import encode_images",
        "def late():\n    from .encode import encode_images",
        "if TYPE_CHECKING:\n    from .encode import encode_images",
        "from diffusers_vae.latents import encode",
    ],
)
def test_a_circle_in_a_chapter_is_found(planted):
    found = circle(sources() | {"diffusers_vae/latents/shards.py": planted})
    assert {"diffusers_vae/latents/encode.py", "diffusers_vae/latents/shards.py"} <= set(found)


def without_encoding(source: str) -> list[int]:
    """Lines that open a text in whatever encoding the machine prefers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", "buffering") for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        ours = isinstance(node.func, ast.Name)  # read_text and write_text of this package
        modes = {value.value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)}
        if (name in ("read_text", "write_text") and not ours) or (name == "open" and modes & {"r", "w", "a", "x"}):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", files())
def test_text_is_utf8_whatever_the_machine_prefers(file):
    assert without_encoding((ROOT / file).read_text(encoding="utf-8")) == []


def test_the_rule_of_encodings_tells_right_from_wrong():
    wrong = 'path.read_text()\npath.write_text(text)\nopen(path, "w")\npath.open("a", errors="x")'
    right = 'path.read_text(encoding="utf-8")\nread_text(path)\nopen(path, "rb")\nopen(path, "w", encoding="utf-8")'
    assert without_encoding(wrong) == [1, 2, 3, 4] and without_encoding(right) == []


def test_package_init_holds_only_public_names():
    """For readers and type checkers as imports, for Python on demand; nothing else."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in typed.body for alias in node.names}
    others = {type(node) for node in tree.body} - {ast.Expr, ast.ImportFrom, ast.If, ast.Assign}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert others == {ast.FunctionDef} and functions == {"__getattr__", "__dir__"}
    assert set(diffusers_vae.__all__) == imported and imported <= set(dir(diffusers_vae))
    assert all(getattr(diffusers_vae, name).__qualname__ == name for name in imported)
    with pytest.raises(AttributeError, match="has no attribute 'VAEE'"):
        _ = diffusers_vae.VAEE


HEAVY = {"datasets", "matplotlib", "sklearn", "tensorboard", "torch_fidelity", "torchmetrics"}  # imported where used
ROWS_BELOW_MODELS = {f"{PACKAGE}.{name}" for row in ROWS[4:] for name in row}


def test_importing_the_package_loads_no_library():
    program = "import sys, diffusers_vae; dir(diffusers_vae); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    assert PACKAGE in tops
    assert not tops & {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "jsonargparse", *HEAVY}


@pytest.mark.slow
def test_libraries_that_only_some_uses_need_are_not_loaded_before(tmp_path):
    """Besides those that stock diffusers loads: accelerate, peft, scipy, torchvision and transformers."""
    uses = [
        ("from diffusers_vae import VAE", "models.vae", {"accelerate", "jsonargparse", *ROWS_BELOW_MODELS}),
        ("from diffusers_vae import *", "latents.encode", {"jsonargparse", f"{PACKAGE}.tasks.autoencoder"}),
        ("from diffusers_vae.cli import training", "tasks.autoencoder", set()),  # for which each `--help` waits
    ]
    program = "import json, sys\ndel sys.modules['diffusers_vae']\nbefore, found = set(sys.modules), []\n"
    program += "".join(f"{code}\nfound.append([*sys.modules.keys() - before])\n" for code, _, _ in uses)
    run_without_package(program + "json.dump(found, open('found.json', 'w'))", tmp_path)
    for (code, loaded, others), found in zip(uses, json.loads((tmp_path / "found.json").read_text()), strict=True):
        assert f"{PACKAGE}.{loaded}" in found, code
        assert not {name for name in found if {name, name.partition(".")[0]} & (HEAVY | others)}, code
