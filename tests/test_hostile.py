"""Nothing that lies in a model, a run, a latent cache or a data set runs: SECURITY.md, followed."""

import io
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.hub import connect
from support.models import tiny_vae
from support.pickles import CONTAINERS, Harm, plant
from support.runs import TINY_VAE, tiny

from diffusers_vae import LatentDataset, cli, encode_images
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.models import load_autoencoder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def harm(tmp_path):
    """What must not run; and it has not."""
    yield Harm(tmp_path / "harm")
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def run(finished_vae_run, tmp_path):
    """A run that is finished, to be changed by a stranger."""
    shutil.copytree(finished_vae_run, tmp_path / "run")
    return tmp_path / "run"


def call(capsys, *arguments):
    """Exit code, and what the command printed."""
    code = cli.main([str(argument) for argument in arguments])
    return code, " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("container", ["plain", "zip", "legacy"])
def test_what_is_planted_would_run(container, tmp_path):
    plant(Harm(tmp_path / "harm"), tmp_path / "weights", container)
    if container == "plain":
        pickle.loads((tmp_path / "weights").read_bytes())
    else:
        torch.load(tmp_path / "weights", weights_only=False)
    assert (tmp_path / "harm").exists()


class TestModels:
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
    def test_file_of_weights(self, suffix, container, harm, tmp_path):
        plant(harm, tmp_path / f"model{suffix}", container)
        with pytest.raises(
            ValueError, match=rf"model{suffix} is (a pickle that|not a torch checkpoint|not a safetensors file)"
        ):
            load_autoencoder(str(tmp_path / f"model{suffix}"))

    @pytest.mark.slow
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
    def test_weights_of_a_folder(self, name, container, harm, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "diffusion_pytorch_model.safetensors").unlink()
        plant(harm, tmp_path / "model" / name, container)
        with pytest.raises((OSError, ValueError), match="diffusion_pytorch_model"):
            load_autoencoder(str(tmp_path / "model"))

    @pytest.mark.parametrize("name", ["DiffusionPipeline", "AutoModel", "os.system", "ModelMixin", 1, None])
    def test_class_of_a_config(self, name, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(ValueError, match=f"must hold an autoencoder .* got the class {name}"):
            load_autoencoder(str(tmp_path / "model"))


class TestRuns:
    """What `evaluate`, `compare` and `fp16` read beside a model."""

    @pytest.mark.slow
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_weights_of_networks_that_a_config_names(self, container, run, harm, no_download, capsys):
        """As runs of older versions could; only torch's cache is looked into."""
        folder = run / "weights"
        folder.mkdir()
        for name in ("alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05-6726825d.pth"):
            plant(harm, folder / name, container)
        text = (run / "config.yaml").read_text()
        text = text.replace("evaluation:\n", f"evaluation:\n  weights: {folder}\n")
        (run / "config.yaml").write_text(text.replace("lpips: []", "lpips: [alex]"))
        code, printed = call(capsys, "evaluate", run, "--out", run / "out")
        assert code == 1 and f"Put alexnet-owt-7be5be79.pth into {no_download}" in printed

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["evaluate", "fp16", "compare", "push"])
    def test_tags_of_a_config(self, command, run, tmp_path, capsys):
        payload = f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'harm'}]"
        with (run / "config.yaml").open("a") as file:
            file.write(f"note: {payload}\n")
        models = [run, run] if command == "compare" else [run]
        code, printed = call(capsys, command, *models, *(["a/b"] if command == "push" else []))
        assert code == 1 and "could not determine a constructor for the tag" in printed
        assert str(run / "config.yaml") in printed and not (tmp_path / "harm").exists()

    @pytest.mark.slow
    def test_where_images_are_read_is_said(self, run, capsys):
        code, printed = call(capsys, "evaluate", run, "--out", run / "out", "--evaluation.max_images", 8)
        assert code == 0 and f"digits, as stated in {run / 'config.yaml'}" in printed

    @pytest.mark.slow
    def test_where_a_named_set_is_read_is_said(self, run, tmp_path, capsys):
        """It is downloaded to there where it is missing."""
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["data"] |= {"name": "cifar10", "root": str(tmp_path / "odd")}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / "cifar-10-batches-py").mkdir()
        code, printed = call(capsys, "evaluate", run, "--out", run / "out")
        assert code == 1 and f"images cifar10 in {tmp_path / 'odd'}, as stated in {run / 'config.yaml'}" in printed


class TestPresets:
    def test_tags(self, tmp_path, capsys):
        preset = tmp_path / "preset.yaml"
        preset.write_text(f"run: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'harm'}]\n")
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--config", str(preset), "--run.output_dir", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"{preset}, line 1: could not determine a constructor" in error
        assert not (tmp_path / "harm").exists() and not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("run:\n  max_images: 020\n", "without leading zeros or colons"),
            ("run:\n  max_images: 1:30\n", "without leading zeros or colons"),
            ("run:\n  seed: 1\n  seed: 2\n", "line 3: the key seed is given twice"),
            ("run: &x {seed: 1}\noptimizer: *x\n", "aliases"),
            ("run: [1]\n", "run must hold settings"),
            ("[" * 1500, "nested too deeply"),
        ],
    )
    def test_traps(self, text, message, tmp_path, capsys):
        (tmp_path / "preset.yaml").write_text(text)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", f"--config={tmp_path / 'preset.yaml'}", "--run.output_dir", str(tmp_path / "run")])
        assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


class TestDataSets:
    """Images are decoded and arrays read; nothing is unpickled."""

    @pytest.mark.parametrize("name", ["images.npy", "images.npz"])
    def test_arrays_of_objects(self, name, harm, tmp_path):
        save = np.save if name.endswith("npy") else np.savez
        save(tmp_path / name, np.array([harm] * 4, dtype=object))
        with pytest.raises(ValueError, match=re.escape(name)):
            load_data(DataConfig(name="array", root=str(tmp_path / name), channels=1, resolution=8))

    @pytest.mark.parametrize("name", ["images.npy", "images.npz"])
    def test_pickles_with_the_name_of_an_array(self, name, harm, tmp_path):
        plant(harm, tmp_path / name)
        with pytest.raises(ValueError, match=re.escape(name)):
            load_data(DataConfig(name="array", root=str(tmp_path / name), channels=1, resolution=8))

    def test_labels_beside_an_array(self, harm, tmp_path):
        np.save(tmp_path / "images.npy", np.zeros((8, 8, 8), np.uint8))
        np.save(tmp_path / "images.labels.npy", np.array([harm] * 8, dtype=object))
        np.save(tmp_path / "labels.npy", np.array([harm] * 8, dtype=object))
        try:
            load_data(DataConfig(name="array", root=str(tmp_path / "images.npy"), channels=1, resolution=8))
        except ValueError as error:
            assert "labels" in str(error)

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".npy"])
    def test_pickles_among_images(self, suffix, harm, tmp_path):
        (tmp_path / "images").mkdir()
        for number in range(4):
            Image.new("L", (8, 8), number).save(tmp_path / "images" / f"{number}.png")
        plant(harm, tmp_path / "images" / f"5{suffix}")
        data = DataConfig(name="folder", root=str(tmp_path / "images"), channels=1, resolution=8, heldout_fraction=0.2)
        try:
            train, heldout = load_data(data)
            for images in (train, heldout):
                images.read(range(len(images))).checked()
        except ValueError as error:
            assert f"5{suffix}" in str(error)


class TestLatentCaches:
    @pytest.fixture
    def cache(self, tmp_path):
        images, _ = load_data(DataConfig(resolution=8))
        encode_images(tiny_vae(), images, tmp_path / "latents", shard_images=1000)
        return tmp_path / "latents"

    def test_shard(self, cache, harm):
        shard = next(cache.glob("shard-*.safetensors"))
        plant(harm, shard)
        with pytest.raises((OSError, ValueError), match=shard.name):
            LatentDataset(cache).verify()

    def test_index(self, cache, harm):
        plant(harm, cache / "index.json")
        with pytest.raises(ValueError, match=r"index\.json"):
            LatentDataset(cache)


WEIGHTS = "diffusion_pytorch_model.safetensors"
SCRIPT = b"import pathlib; pathlib.Path(%r).touch()\n"


@pytest.mark.slow
class TestRepositories:
    """What a stranger has put on the Hub, by NAMESPACE/NAME."""

    @pytest.fixture
    def stranger(self, hub, tmp_path, monkeypatch):
        connect(monkeypatch, hub.url, tmp_path / "home")
        return hub

    @pytest.fixture
    def planted(self, harm, tmp_path):
        """The content of a file that would run, in a container."""

        def content(container="plain"):
            plant(harm, tmp_path / "planted", container)
            return (tmp_path / "planted").read_bytes()

        return content

    @pytest.fixture
    def model(self, tmp_path):
        """The files of a sound model."""
        tiny_vae(1, sample_size=8).save_pretrained(tmp_path / "model")
        return {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    @pytest.mark.parametrize(
        ("name", "container"),
        [
            *(("diffusion_pytorch_model.bin", container) for container in CONTAINERS),
            ("diffusion_pytorch_model.fp16.bin", "legacy"),
            (WEIGHTS, "zip with one entry"),
            ("diffusion_pytorch_model-00001-of-00001.safetensors", "plain"),
        ],
    )
    def test_weights_of_a_model(self, name, container, stranger, planted, model):
        index = {"metadata": {"total_size": 1}, "weight_map": {"encoder.conv_in.weight": name}}
        files = {f"{WEIGHTS}.index.json": json.dumps(index).encode()} if "-of-" in name else {}
        stranger.put("eve/model", files | {"config.json": model["config.json"], name: planted(container)})
        with pytest.raises((OSError, ValueError), match=name.replace(".fp16", "")) as error:
            load_autoencoder("eve/model")
        assert "weights_only=False" not in str(error.value)

    @pytest.mark.parametrize("command", ["evaluate", "encode"])
    def test_what_lies_beside_the_weights_of_a_model(self, command, stranger, planted, model, harm, tmp_path, capsys):
        """None of it is even downloaded."""
        script = SCRIPT % str(harm.path)
        config = json.loads(model["config.json"])
        config |= {"_name_or_path": "{{ 'eve' * 3 }}", "auto_map": {"AutoModel": "eve/model--vae.VAE"}}
        beside = {name: script for name in ("vae.py", "pipeline.py", "eve.py", "__init__.py", "conftest.py")}
        beside |= {name: planted() for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt")}
        beside["config.yaml"] = f"data: !!python/object/apply:pathlib.Path.touch [{harm.path}]\n".encode()
        beside["evaluation.json"] = planted()
        beside["model_index.json"] = json.dumps({"_class_name": ["pipeline", "Eve"], "vae": ["vae", "VAE"]}).encode()
        stranger.put("eve/model", model | {"config.json": json.dumps(config).encode()} | beside)
        arguments = ["evaluate", "eve/model", "--data", "digits", "--evaluation.max_images", 8]
        if command == "encode":
            arguments = ["encode", "digits", "--vae", "eve/model", "--split", "held-out"]
        code, printed = call(capsys, *arguments, "--data.resolution", 8, "--out", tmp_path / "out")
        assert code == 0, printed
        written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert b"eveeveeve" not in written and "eveeveeve" not in printed
        asked = {request.rpartition("/")[2] for request, _ in stranger.requests if "/resolve/" in request}
        assert {"config.json", WEIGHTS} <= asked and not asked & beside.keys()

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("script", r"cannot load the data set eve/rows: .* found rows\.py"),
            ("pickles", r"cannot load the data set eve/rows: .*train\.pkl"),
            ("weights among images", r"cannot load the data set eve/rows: a \.pth file in it is refused"),
            ("arrays among images", "cannot load the data set eve/rows: .* the magic string is not correct"),
            ("images", r"\{\{ 31415 \* 92653 \}\}\.png"),
        ],
    )
    def test_data_set(self, kind, message, stranger, planted, harm):
        files = {"rows.py": SCRIPT % str(harm.path)} if kind == "script" else {}
        if kind == "pickles":
            files = {name: planted() for name in ("train.pkl", "train.pickle", "data/train.pt", "dataset.joblib")}
            files["README.md"] = b"---\nconfigs:\n- config_name: pandas\n  data_files: train.pkl\n---\n"
        members = {
            "weights among images": ["0.png", "0.pth"],
            "arrays among images": ["0.png", "0.npy"],
            "images": ["{{ 31415 * 92653 }}.png", "1.png"],
        }
        if kind in members:
            archive = io.BytesIO()
            with tarfile.open(fileobj=archive, mode="w") as opened:
                for name in members[kind]:
                    found = tarfile.TarInfo(name)
                    content = planted("zip" if name.endswith("pth") else "plain")
                    found.size = len(content)
                    opened.addfile(found, io.BytesIO(content))
            files["train.tar"] = archive.getvalue()
        stranger.put("datasets/eve/rows", files)
        data = DataConfig(name="datasets", root="eve/rows", resolution=8, heldout_fraction=0.5)
        with pytest.raises((OSError, ValueError), match=message) as error:
            load_data(data)
        assert "weights_only" not in str(error.value)


@pytest.mark.slow
def test_name_of_a_run_is_no_template(tmp_path, capsys):
    """Neither in the card nor in the report."""
    folder = tmp_path / "{{ 31415 * 92653 }}{% raw %}"
    tiny(folder, TINY_VAE, max_images=20).save(tmp_path / "run.yaml")
    assert call(capsys, "train", "--config", tmp_path / "run.yaml")[0] == 0
    for name in ("README.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "2910693995" not in text and "31415 * 92653" in text


def test_page_names_every_kind_of_file():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npy", ".npz", "config.yaml", "index.json"):
        assert f"`{suffix}`" in text
