"""Shared fixtures. Real data sets lie in ../shared/data beside the checkout; tests that need them skip without.

Slow imports are inside the fixtures, since pytest also loads this file in the process that starts the workers.
"""

import gc
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of other workers want the cores that would be spun on
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers imports torch once per core
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 2**32:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # no test needs a disk, and syncing one takes long
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process of every test compiles all modules

import pytest

gc.disable()  # until the tests are collected: imports create a million objects that stay alive

LONGEST = "resume crash_points fast_training distributed silence fine_tuning trainer sources text_to_image scale hub"
"""Files of tests that take long, the longest first."""
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def forks_servers(config) -> bool:
    """Whether this process runs tests, and can be forked: elsewhere than on Linux, libraries may not survive it."""
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)
    return sys.platform == "linux" and runs_tests and not config.option.collectonly


def pytest_sessionstart(session):
    if forks_servers(session.config):
        from support import stock

        stock.fork_the_server()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session):
    if forks_servers(session.config):
        from support import launches

        launches.fork_the_server()
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread, and the shortcuts of all tests, before any fixture of a module computes."""
    import torch
    from support.shortcuts import take_shortcuts

    torch.set_num_threads(1)
    take_shortcuts()


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory):
    """torch's cache, whatever that of the user holds, with a squeezenet of random weights."""
    from support.runs import use_random_networks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", "")  # so that it is as before in the end
        use_random_networks(tmp_path_factory.mktemp("torch"))
        yield


@pytest.fixture
def drawn_figures():
    """Figures as users see them; they are left blank otherwise."""
    from support import shortcuts

    with shortcuts.drawn_figures():
        yield


def pytest_collection_modifyitems(config, items):
    """Leave out what `-m soak` is for unless it is asked for, and begin with the files that take longest, so that the
    workers end at the same time.
    """
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]

    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Exclude the objects that imports created from garbage collection."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def new_launch():
    """Accelerate keeps the first precision of a process, and torch its number of threads: every test is a launch of its
    own, with one thread, so that the workers of pytest share the cores and sums are rounded the same way everywhere.
    """
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, read-only."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def mnist_root(shared_data, tmp_path_factory) -> Path:
    """A torchvision root with MNIST unpacked."""
    root = tmp_path_factory.mktemp("mnist")
    shutil.copytree(shared_data / "MNIST", root / "MNIST", copy_function=shutil.copyfile)
    for packed in list((root / "MNIST" / "raw").glob("*.gz")):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    return root


@pytest.fixture(scope="session")
def cifar_folder(shared_data, tmp_path_factory) -> Path:
    """A folder of real RGB 32x32 PNG files: train/<class>/ and test/<class>/."""
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_data / "cifar10-5k.tar") as archive:
        archive.extractall(root, filter="data")
    return root / "cifar10-5k"


@pytest.fixture(scope="session")
def finished_vae_run(tmp_path_factory) -> Path:
    """The folder of a finished run on 8x8 digits, with an evaluation, pictures, a report, a card and a tracker's log;
    beside it, what the command printed. Shared by all tests: a test that changes it works on a copy.
    """
    from support.runs import TINY_VAE
    from support.shortcuts import drawn_figures

    with drawn_figures():
        return finished_run(tmp_path_factory, "small-vae", TINY_VAE, tracker="tensorboard")


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder, to be put on the module path, with what a wheel of this checkout installs."""
    from support.files import copy_checkout

    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    copy_checkout(folder / "source")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="session")
def finished_mlp_run(tmp_path_factory) -> Path:
    """The folder of a finished run of an MLP with two latent units, whose figures are blank; see `finished_vae_run`."""
    from support.runs import TINY_MLP

    return finished_run(tmp_path_factory, "small-mlp", TINY_MLP)


def finished_run(tmp_path_factory, name, model, **run) -> Path:
    from accelerate.state import AcceleratorState
    from support.runs import tiny

    from diffusers_vae import cli

    folder = tmp_path_factory.mktemp("finished") / name
    tiny(folder, model, **run).save(folder.parent / "run.yaml")
    AcceleratorState._reset_state(True)  # of the test before
    with redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["train", "--config", str(folder.parent / "run.yaml")]) == 0
    (folder.parent / "printed.txt").write_text(printed.getvalue())
    AcceleratorState._reset_state(True)
    return folder


@pytest.fixture
def no_download(monkeypatch, tmp_path) -> Path:
    """An empty cache of torch, and no network to fill it from; the folder where files of weights are looked for."""

    def fail(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def impatient_locks(monkeypatch) -> list[float]:
    """Wait at most 0.2 s for a lock. The list holds the timeouts that were asked for, in seconds."""
    from filelock import FileLock

    acquire, patience = FileLock.acquire, []

    def acquire_impatiently(self, timeout=0, **settings):
        patience.append(timeout)
        return acquire(self, timeout=min(timeout, 0.2), **settings)

    monkeypatch.setattr(FileLock, "acquire", acquire_impatiently)
    return patience


@pytest.fixture
def little_memory():
    """At most 16 MB more address space than now, so that a large picture raises a MemoryError."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    gc.collect()  # what a failed run had open may wait for it
    if subprocess.run(["umount", str(disk)]).returncode:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        pytest.fail("something is still open on the disk")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the client in this process talks to, with Ann logged in."""
    from support.hub import READ_TOKEN, TOKEN
    from support.hub_server import HubServer, User

    tokens = {TOKEN: User("ann", orgs=("lab",)), READ_TOKEN: User("ann", role="read")}
    with HubServer(tokens) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
