"""What works where only the core dependencies are installed, without the `train` extra."""

import ast
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def core_distributions() -> set[str]:
    """Names of the distributions that `pip install diffusers-vae` without extras installs."""
    found, pending = set(), ["diffusers-vae"]
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            requirements = [Requirement(text) for text in distribution(name).requires or []]
            pending += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def core_site(tmp_path_factory) -> Path:
    """A folder of installed packages with links to those of the core dependencies alone."""
    site = tmp_path_factory.mktemp("site")
    for name in core_distributions() - {"diffusers-vae"}:
        installed = distribution(name)
        for top in {path.parts[0] for path in installed.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(installed.locate_file(top)).resolve())
    (site / "diffusers_vae").symlink_to(ROOT / "diffusers_vae")
    return site


def run(site: Path, code: str) -> subprocess.CompletedProcess:
    """Run `code` in a process that finds the standard library and `site` alone."""
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(site)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True)


def imported_at_once(file: Path) -> set[str]:
    """Names of the packages that a module imports as it is imported."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow
def test_public_names_work_and_commands_name_the_train_extra(core_site, tmp_path):
    done = run(
        core_site,
        "import importlib.util, torch, diffusers_vae\n"
        "from diffusers_vae.cli import main\n"
        "assert not any(map(importlib.util.find_spec, ('scipy', 'jsonargparse', 'sklearn', 'torchmetrics')))\n"
        "for name in diffusers_vae.__all__:\n"
        "    getattr(diffusers_vae, name)\n"
        "from diffusers_vae.data import ArrayImages\n"
        "images = torch.zeros(4, 3, 8, 8)\n"
        "vae = diffusers_vae.VAE(block_out_channels=(8,), norm_num_groups=4).eval()\n"
        "objective = diffusers_vae.VAEObjective(diffusers_vae.Gaussian(0.1))\n"
        "terms = objective(images, *vae(images, return_dict=False, return_posterior=True))\n"
        "assert terms.loss.isfinite()\n"
        "statistics = diffusers_vae.measure_latents(vae, torch.rand(4, 3, 8, 8))\n"
        "assert statistics.scaling_factor == vae.config.scaling_factor\n"
        "pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)\n"
        f"diffusers_vae.encode_images(vae, ArrayImages(pixels), {str(tmp_path / 'latents')!r})\n"
        f"assert len(diffusers_vae.LatentDataset({str(tmp_path / 'latents')!r})[3]) > 0\n"
        "print(*[module.__file__ for name, module in sys.modules.items() if name.startswith('diffusers_vae')])\n"
        "assert main(['encode', '--help']) == main(['train']) == 1\n",
    )
    assert done.returncode == 0, done.stderr
    for command in ("encode", "train"):
        text = f'{command} needs jsonargparse, which is not installed: pip install "diffusers-vae[train]"'
        assert f"error: diffusers-vae {text}" in done.stderr.splitlines()
    requirements = [Requirement(text) for text in distribution("diffusers-vae").requires or []]
    declared = {requirement.name for requirement in requirements if not requirement.marker} | {"PIL"}  # of pillow
    files = done.stdout.splitlines()[0].split()
    imported = {name for file in files for name in imported_at_once(Path(file))}
    assert len(files) > 10 and imported - sys.stdlib_module_names - declared - {"diffusers_vae"} == set()
