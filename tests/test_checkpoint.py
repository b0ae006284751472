"""The state of a run on disk: whole or not there, found whatever happened to it, restored to the last bit."""

import gc
import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.files import flip
from support.runs import tiny

from diffusers_vae.engine.checkpoint import FORMAT, find_checkpoint, read_progress, tidy
from diffusers_vae.engine.state import TrainState
from diffusers_vae.engine.step import Discriminator
from diffusers_vae.models import ModelConfig
from diffusers_vae.storage import delete_folder, digest_of, naming, watch, whole_folder, write_file


class State:
    """A tiny model with everything that is trained beside it, some steps from where it began."""

    def __init__(self, seed: int, steps: int = 0, hidden_dim: int = 8, critic: torch.nn.Module | None = None):
        torch.manual_seed(seed)
        model = ModelConfig(architecture="mlp", hidden_dim=hidden_dim, latent_dim=2)
        critic = critic or torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(64, 1))
        self.discriminator = Discriminator(critic, torch.optim.AdamW(critic.parameters(), lr=1e-2))
        self.state = TrainState(
            Accelerator(cpu=True), lambda: model.build(1, (8, 8)), tiny("unused", seed=seed, ema_decay=0.9999),
            ("distortion", "rate"), blank=lambda model: pytest.fail("one process"), discriminator=self.discriminator,
        )  # fmt: skip
        self.state.interval.put([0.1, 1 / 3, 0.0, 2.0])
        for _ in range(steps):
            self.step()

    def step(self):
        images = torch.rand(4, 1, 8, 8) * 2 - 1
        reconstructions = self.state.model(images, sample_posterior=True).sample
        (reconstructions.pow(2).sum() + self.discriminator.module(reconstructions.flatten(1)).sum()).backward()
        self.state.take_step(judged=True)
        self.state.zero_grad()

    def save(self, folder, images_seen, keep=10):
        copy = folder.parent / "config.yaml"
        if not copy.exists():
            copy.write_text("run: {seed: 0}\n")
        self.state.images_seen = self.state.step = images_seen
        return self.state.save(folder, {"learned": 0.1}, [copy], keep)

    def values(self):
        parts = self.state.plain_model.parameters(), self.state.ema.shadow_params
        return [*parts[0], *parts[1], *self.discriminator.module.state_dict().values()]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestRoundTrip:
    def test_training_continues_bit_identically(self, folder):
        """The same draws, the same steps, from a model that was begun otherwise."""
        first = State(seed=0, steps=3)
        random.seed(5), np.random.seed(6)
        path = first.save(folder, 12)
        drawn = random.random(), np.random.standard_normal(), torch.randn(3).tolist()
        for _ in range(3):
            first.step()
        second = State(seed=1, steps=5)
        second.state.load(path)
        assert drawn == (random.random(), np.random.standard_normal(), torch.randn(3).tolist())
        for _ in range(3):
            second.step()
        assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
        for p, q in zip(first.state.parameters, second.state.parameters, strict=True):
            a, b = first.state.optimizer.state[p], second.state.optimizer.state[q]
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    @pytest.mark.slow
    def test_restored_state_does_not_map_the_files(self, folder):
        """Its space is free as soon as it is deleted, and a disk that goes away takes no state along."""
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs /proc")
        first, second = State(seed=0, steps=1), State(seed=1)
        second.state.load(first.save(folder, 12))
        gc.collect()
        assert str(folder) not in maps.read_text()

    def test_a_discriminator_that_it_does_not_hold_stays_new(self, folder):
        first, second = State(seed=0, steps=2), State(seed=1)
        first.state.discriminator = None
        begun = [value.clone() for value in second.discriminator.module.state_dict().values()]
        second.state.load(first.save(folder, 12))
        assert all(map(torch.equal, begun, second.discriminator.module.state_dict().values()))

    def test_another_discriminator_is_refused(self, folder):
        first, other = State(seed=0, steps=1), State(seed=0, critic=torch.nn.Linear(3, 1))
        with pytest.raises(ValueError, match="of another discriminator"):
            other.state.load(first.save(folder, 12))

    def test_a_discriminator_that_is_not_finite_is_not_saved(self, folder):
        state = State(seed=0, steps=1)
        state.discriminator.module.bias.data.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="discriminator are not finite, bias"):
            state.save(folder, 12)

    def test_numbers_come_back_as_they_were(self, folder):
        path = State(seed=0, steps=1).save(folder, 12)
        progress, own = read_progress(path, 0)
        assert progress["images_seen"] == 12 and own["interval"] == [0.1, 1 / 3, 0, 2]
        assert read_progress(path, 1)[1] == {}
        assert (path / "config.yaml").read_text() == "run: {seed: 0}\n"

    def test_nothing_in_it_is_a_pickle(self, folder):
        path = State(seed=0, steps=1).save(folder, 12)
        assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ".yaml"}

    def test_another_model_is_refused(self, folder):
        path = State(seed=0, steps=1).save(folder, 12)
        other = State(seed=0, hidden_dim=9)
        with pytest.raises(
            ValueError, match=r"of another model.*decoder\.0\.bias has the shape \(8,\) there and \(9,\) here"
        ):
            other.state.load(path)

    def test_the_newest_are_kept(self, folder):
        state = State(seed=0, steps=1)
        for images_seen in (4, 8, 12, 16):
            state.save(folder, images_seen, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == ["images-000000000012", "images-000000000016"]
        state.save(folder, 20, keep=1)
        assert [path.name for path in folder.iterdir()] == ["images-000000000020"]

    @pytest.mark.parametrize("deleted", [0, 3])
    def test_one_that_was_half_deleted_at_a_kill_neither_looks_damaged_nor_stays(self, deleted, folder):
        """Nor does one that was to be deleted next."""
        state, left = State(seed=0, steps=1), [deleted]
        for images_seen in (4, 8):
            state.save(folder, images_seen)

        def kill(operation, path, *_):
            if operation == "unlink" and "000000000004" in str(path):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1

        watch(kill)
        try:
            with pytest.raises(KeyboardInterrupt):
                state.save(folder, 12, keep=1)
        finally:
            watch(None)
        assert [path.name[-2:] for path in sorted(folder.glob("images-*"))] == ["08", "12"]
        newest, damaged = find_checkpoint(folder)
        tidy(folder, newest, keep=1)
        assert list(folder.iterdir()) == [newest] and not damaged and newest.name.endswith("12")

    def test_weights_that_are_not_finite_are_not_saved(self, folder):
        state = State(seed=0, steps=1)
        before = state.save(folder, 4, keep=1)
        with torch.no_grad():
            state.state.model.mean.weight[0, 0] = torch.inf
        with pytest.raises(FloatingPointError, match=r"diverged after step 8: 1 tensors .* mean\.weight"):
            state.save(folder, 8, keep=1)
        assert find_checkpoint(folder) == (before, [])


FILES = [
    "config.yaml", "discriminator.safetensors", "discriminator_optimizer.safetensors", "ema.safetensors",
    "manifest.json", "model.safetensors", "optimizer.safetensors", "process-00000.json", "progress.json",
]  # fmt: skip


class TestDamage:
    @pytest.fixture
    def two(self, folder):
        state = State(seed=0, steps=1)
        return state.save(folder, 4), state.save(folder, 8)

    def test_the_newest_is_found(self, two, folder):
        assert find_checkpoint(folder) == (two[1], [])

    def test_without_any_none_is_found(self, folder):
        assert find_checkpoint(folder) == (None, [])

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize(
        "damage",
        [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b"")],
        ids=["flipped", "missing", "short", "empty"],
    )
    def test_a_damaged_one_is_named_and_passed_over(self, name, damage, two, folder):
        assert {path.name for path in two[1].iterdir()} == set(FILES)
        damage(two[1] / name)
        found, (problem,) = find_checkpoint(folder)
        assert found == two[0]
        assert problem.startswith(f"{two[1]} is damaged: ")
        assert name in problem or name == "manifest.json"

    @pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {}}', "null"])
    def test_one_with_an_unreadable_manifest_is_passed_over(self, text, two, folder):
        (two[1] / "manifest.json").write_text(text)
        assert find_checkpoint(folder)[0] == two[0]

    def test_copies_that_somebody_made_are_neither_taken_for_checkpoints_nor_deleted(self, two, folder):
        copies = [folder / f"{path.name}.backup" for path in two] + [folder / "images-of mine"]
        for copy in copies:
            shutil.copytree(two[0], copy)
        assert find_checkpoint(folder) == (two[1], [])
        tidy(folder, two[1], keep=1)
        assert {*folder.iterdir()} == {two[1], *copies}

    def test_one_that_was_half_written_is_named_and_deleted(self, two, folder):
        partial = folder / ".images-000000000012.partial"
        two[1].rename(partial)
        (partial / "manifest.json").unlink()
        assert find_checkpoint(folder) == (two[0], [f"{partial} is half-written"])
        tidy(folder, two[0], keep=2)
        assert [path.name for path in folder.iterdir()] == [two[0].name]

    def test_a_damaged_one_does_not_take_the_place_of_a_good_one(self, two, folder):
        flip(two[1] / "model.safetensors")
        state = State(seed=0, steps=1)
        state.save(folder, 6, keep=2)
        assert {path.name[-1] for path in folder.iterdir()} == {"4", "6", "8"}
        state.save(folder, 8, keep=2)  # what the run comes to again
        assert find_checkpoint(folder) == (two[1], []) and len(list(folder.iterdir())) == 2

    def test_when_none_is_whole_nothing_starts_over_silently(self, two, folder):
        for path in two:
            flip(path / "model.safetensors")
        with pytest.raises(ValueError, match="no checkpoint is whole") as error:
            find_checkpoint(folder)
        assert all(str(path) in str(error.value) for path in two)

    def test_a_newer_format_is_refused(self, two, folder):
        manifest = json.loads((two[1] / "manifest.json").read_text())
        manifest |= {"format": FORMAT + 1, "sha256": digest_of([FORMAT + 1, manifest["files"]])}
        (two[1] / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"format {FORMAT + 1}, .* reads up to {FORMAT}"):
            find_checkpoint(folder)


@contextmanager
def closed(folder):
    """Within, `folder` cannot be written to, by root neither."""
    user = os.geteuid()
    os.chmod(folder, 0o555)
    for parent in folder.parents:  # which pytest keeps to its user
        if "pytest-of-" in str(parent):
            os.chmod(parent, parent.stat().st_mode | 0o055)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        os.chmod(folder, 0o755)


def test_what_a_linked_folder_holds_stays_when_the_folder_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("mine")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "elsewhere")
    delete_folder(tmp_path / "inside")
    for name in ("model", "other"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "b").write_text("new")
    delete_folder(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]
    assert (tmp_path / "elsewhere" / "a").read_text() == "mine" and (tmp_path / "model" / "b").read_text() == "new"


def test_a_replaced_folder_that_cannot_be_deleted_does_not_fail_the_new_one(tmp_path):
    """As on a network file system, where a file is open elsewhere."""

    def refuse(operation, path, to):
        if operation == "unlink":
            raise OSError("busy")

    for text in ("first", "second", "third"):
        watch(refuse if text == "second" else None)
        try:
            with whole_folder(tmp_path / "model") as folder:
                (folder / "a").write_text(text)
        finally:
            watch(None)
        assert (tmp_path / "model" / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class TestRefusedByTheDisk:
    @pytest.mark.slow
    def test_full_disk_leaves_what_was_saved_whole(self, small_disk):
        """What was saved stays whole, the message names the path, nothing half-written takes room."""
        folder = small_disk / "checkpoints"
        state = State(seed=0, steps=1)
        first = state.save(folder, 4)
        before = contents(folder)
        with pytest.raises(OSError, match=r"cannot write .*/images-0000000000\d\d: .*No space left") as error:
            for images_seen in range(8, 100, 4):
                state.save(folder, images_seen)
        assert str(folder) in str(error.value)
        kept = contents(folder)
        assert before.items() <= kept.items() and not any(name.startswith(".") for name in kept)
        assert find_checkpoint(folder)[1] == []
        for path in folder.iterdir():
            if path != first:
                (path / "model.safetensors").unlink()
        assert find_checkpoint(folder)[0] == first

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
    def test_folder_without_write_permission_is_named(self, folder):
        state = State(seed=0, steps=1)
        first = state.save(folder, 4)
        with (
            closed(folder),
            pytest.raises(OSError, match=r"cannot write .*/images-000000000008: Permission denied"),
        ):
            state.save(folder, 8)
        assert find_checkpoint(folder) == (first, [])

    @pytest.mark.slow
    def test_file_that_cannot_be_replaced_stays(self, small_disk):
        path = small_disk / "config.yaml"
        write_file(path, "old")
        with pytest.raises(OSError, match=rf"cannot write {path}: .*No space left"):
            write_file(path, "new" * 2**17)
        assert path.read_text() == "old"


class TestFolder:
    def test_takes_the_place_of_the_old_one_whole(self, tmp_path):
        for text in ("old", "new"):
            with whole_folder(tmp_path / "model") as folder:
                (folder / "deep").mkdir()
                (folder / "deep" / f"{text}.txt").write_text(text)
        assert contents(tmp_path) == {"model/deep/new.txt": b"new"}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_stays_as_it_was_when_something_fails(self, error, tmp_path):
        with whole_folder(tmp_path / "model") as folder:
            (folder / "old.txt").write_text("old")
        with pytest.raises(error), whole_folder(tmp_path / "model") as folder:
            (folder / "new.txt").write_text("new")
            raise error
        assert contents(tmp_path) == {"model/old.txt": b"old"}

    def test_other_errors_pass_through(self, tmp_path):
        with pytest.raises(ValueError, match="mine"), naming(tmp_path):
            raise ValueError("mine")


@pytest.mark.skipif(os.name == "nt", reason="needs permissions of POSIX")
def test_files_are_as_readable_as_others(tmp_path):
    """Those of safetensors, too, which others of a cluster want to load."""
    (tmp_path / "config.yaml").write_text("run: {seed: 0}\n")
    usual = (tmp_path / "config.yaml").stat().st_mode
    path = State(0, 1).save(tmp_path / "checkpoints", 30)
    assert {file.stat().st_mode for file in path.iterdir()} == {usual} and list(path.glob("*.safetensors"))
