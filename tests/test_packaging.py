"""What a release holds and how it is installed, and the files of the repository that other programs read."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from support.files import copy_checkout

import diffusers_vae

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "training" / "cluster" / "kubernetes.yaml"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
SCRIPTS = ("train_vae", "train_text_to_image")
TINY = (
    "--data.resolution=8", "--model.block_out_channels=[8,8]", "--model.norm_num_groups=4", "--run.max_images=60",
    "--run.batch_size=30", "--run.mixed_precision=no", "--run.tracker=null", "--evaluation.max_images=20",
)  # fmt: skip
PRESET = ["--preset=digits"]
COMMANDS = """
import sys
from importlib.metadata import entry_points
import diffusers_vae
print(diffusers_vae.__file__)
(command,) = entry_points(group="console_scripts", name="diffusers-vae")
main = command.load()
assert main(["train", *sys.argv[1:]]) == 0
assert main(["data", "digits"]) == 0
assert main(["evaluate", "runs/digits", "--evaluation.max_images=20", "--out=measured"]) == 0
"""


def run(*command, cwd: Path) -> str:
    """Run a command outside of the checkout and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "UV_"))}
    # uv's cache may hold wheels of these names that lead to the environment of earlier tests
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "UV_NO_CACHE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def header(script: str) -> dict:
    """Inline metadata of a script, by the regular expression of PEP 723."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (found,) = re.finditer(block, (ROOT / "training" / f"{script}.py").read_text())
    assert found["type"] == "script"
    return tomllib.loads(
        "".join(line.removeprefix("#").removeprefix(" ") for line in found["content"].splitlines(True))
    )


def write_wheel(folder: Path, name: str, version: str, content: dict[str, str]):
    """Write a wheel without requirements."""
    stem = f"{re.sub(r'[-_.]+', '_', name)}-{version}"
    content = content | {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in (*content, f"{stem}.dist-info/RECORD"))
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file, text in (content | {f"{stem}.dist-info/RECORD": record}).items():
            archive.writestr(file, text)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder with the sdist of this checkout and the wheel that was built from it."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("released")
    copy_checkout(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "source", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def links(released, tmp_path_factory) -> Path:
    """A folder of wheels, instead of an index: the released one, and all packages of this environment by name and
    version only. An environment that installs `torch` from it finds their modules where they are now.
    """
    folder = tmp_path_factory.mktemp("links")
    shutil.copy(*released.glob("*.whl"), folder)
    places = [path for path in sys.path if path.endswith("-packages")]
    modules = {"environment.pth": "\n".join(places) + "\n"}
    for package in distributions():
        if package.name != "diffusers-vae":
            write_wheel(folder, package.name, package.version, modules if package.name == "torch" else {})
    return folder


@pytest.fixture
def empty(tmp_path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def files_of(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


@pytest.mark.slow
class TestRelease:
    def test_wheel_from_the_sdist_is_that_of_the_checkout(self, released, installed):
        (wheel,) = released.glob("*.whl")
        files = [path for path in installed.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        with zipfile.ZipFile(wheel) as archive:
            assert set(archive.namelist()) == {path.relative_to(installed).as_posix() for path in files}
            for path in files:
                assert archive.read(path.relative_to(installed).as_posix()) == path.read_bytes(), path

    def test_sdist_holds_licence_and_changelog_but_no_tests(self, released):
        (sdist,) = released.glob("*.tar.gz")
        files = files_of(sdist)
        assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "README.md", "pyproject.toml"} <= files
        assert [name for name in files if name.startswith(("tests/", "runs/", ".git"))] == []

    def test_twine_accepts_both(self, released):
        pytest.importorskip("twine")
        printed = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *released.iterdir(), cwd=ROOT)
        assert printed.count("PASSED") == 2

    def test_wheel_trains_looks_and_measures_in_an_empty_folder(self, links, empty, tmp_path):
        pytest.importorskip("uv")
        fresh = tmp_path / "environment"
        uv = (sys.executable, "-m", "uv", "--no-config", "--offline", "--quiet")
        run(*uv, "venv", "--python", sys.executable, fresh, cwd=empty)
        install = ("pip", "install", "--python", fresh, "--no-index", "--find-links", links)
        run(*uv, *install, "diffusers-vae[train]", cwd=empty)
        assert run(fresh / "bin" / "diffusers-vae", "--version", cwd=empty) == f"{diffusers_vae.__version__}\n"
        printed = run(fresh / "bin" / "python", "-c", COMMANDS, *PRESET, *TINY, cwd=empty)
        assert Path(printed.splitlines()[0]).is_relative_to(fresh)
        after, again = (
            json.loads((empty / name / "evaluation.json").read_text()) for name in ("runs/digits", "measured")
        )
        assert after["psnr"] == again["psnr"]


class TestScripts:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_header_asks_for_the_package_with_what_trains(self, script):
        metadata = header(script)
        (requirement,) = map(Requirement, metadata["dependencies"])
        assert (requirement.name, requirement.extras) == ("diffusers-vae", {"train"})
        assert metadata["requires-python"] in (ROOT / "pyproject.toml").read_text()

    @pytest.mark.slow
    def test_uv_runs_one_in_an_empty_folder(self, links, empty, tmp_path):
        pytest.importorskip("uv")
        shutil.copy(ROOT / "training" / "train_vae.py", tmp_path)
        uv = (sys.executable, "-m", "uv", "--no-config", "--offline", "--cache-dir", tmp_path / "cache")
        found = ("--python", sys.executable, "--no-index", "--find-links", links)
        run(*uv, "run", *found, tmp_path / "train_vae.py", *TINY, cwd=empty)
        assert (empty / "runs" / "digits" / "model" / "config.json").exists()


SCHEMAS = {
    "github-workflows": [".github/workflows/ci.yml", ".github/workflows/publish.yml"],
    "github-issue-forms": [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"],
    "citation-file-format": ["CITATION.cff"],
}


class TestRepository:
    @pytest.mark.slow
    @pytest.mark.parametrize("schema", SCHEMAS)
    def test_files_have_the_syntax_of_their_readers(self, schema):
        pytest.importorskip("check_jsonschema")
        command = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema])
        run(*command, cwd=ROOT)

    def test_every_workflow_and_form_is_checked(self):
        named = {ROOT / name for names in SCHEMAS.values() for name in names}
        assert set((ROOT / ".github").rglob("*.yml")) | {ROOT / "CITATION.cff"} == named

    def test_ci_covers_every_python_and_the_oldest_dependencies(self):
        jobs = WORKFLOWS["ci"]["jobs"]
        pythons = jobs["newest"]["strategy"]["matrix"]["python"]
        assert pythons == [f"3.{minor}" for minor in range(10, 10 + len(pythons))] and len(pythons) >= 4
        assert {"run": ".ci/run"} in jobs["newest"]["steps"]
        (install,) = [step["run"] for step in jobs["oldest"]["steps"] if "pip install" in step.get("run", "")]
        assert "--resolution lowest-direct" in install and '".[train]"' in install

    def test_publishing_needs_no_password(self):
        job = WORKFLOWS["publish"]["jobs"]["publish"]
        (step,) = [step for step in job["steps"] if step["uses"].startswith("pypa/gh-action-pypi-publish@")]
        assert job["permissions"] == {"id-token": "write"} and "with" not in step
        assert WORKFLOWS["publish"]["permissions"] == {"contents": "read"}
        assert "secrets." not in (ROOT / ".github" / "workflows" / "publish.yml").read_text()

    def test_citation_names_the_version(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["version"] == diffusers_vae.__version__

    def test_image_is_what_kubernetes_starts(self):
        dockerfile = (ROOT / "Dockerfile").read_text()
        _, job = yaml.safe_load_all(KUBERNETES.read_text())
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert f"docker build -t {container['image']} ." in dockerfile
        assert re.search(r"^WORKDIR (.*)", dockerfile, re.M)[1] == container["workingDir"]
        ignored = (ROOT / ".dockerignore").read_text().split()
        assert not {"training", "diffusers_vae", "model_cards", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)

    @pytest.mark.slow
    def test_hooks_pass_on_a_file_of_this_project(self):
        (source,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        commands = {hook["id"]: hook["entry"].split() for hook in source["hooks"]}
        assert source["repo"] == "local" and commands.keys() == {"ruff", "ruff-format", "pyright"}
        for name in ("ruff", "ruff-format"):
            program, *flags = commands[name]
            check = [flag for flag in flags if flag != "--fix"] + ["--check"] * (name == "ruff-format")
            run(sys.executable, "-m", program, *check, __file__, cwd=ROOT)
