"""Images in archives are the images of the folder that was packed."""

import io
import pickle
import re
import shutil
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.files import ByIndex, pack, paths_of, pixels_of, tarred, zipped
from torch.utils.data import DataLoader

from diffusers_vae.data import DataConfig, load_data, load_split
from diffusers_vae.data.files import Files


@pytest.fixture
def folder(cifar_folder, tmp_path):
    """Ships and cats, a caption beside each, and what must not be taken for an image."""
    root = tmp_path / "images"
    for name in ("cat", "ship"):
        (root / name).mkdir(parents=True)
        for path in sorted((cifar_folder / "test" / name).iterdir())[:20]:
            shutil.copyfile(path, root / name / path.name)
            (root / name / f"{path.stem}.txt").write_text(f"number {path.stem}")
        (root / name / "notes.csv").write_text("no image")
        (root / name / ".hidden.png").write_bytes(b"no image")
    return root


KINDS = ["tar", "zip", "zip, stored", "shards"]


def config(root, **settings):
    settings = {"channels": 3, "resolution": 16, "num_workers": 0} | settings
    return DataConfig(name="folder", root=str(root), **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 0], ids=["memory", "on demand"])
class TestTheSameAsAFolder:
    @pytest.mark.slow
    def test_images_labels_and_captions_are_those_of_the_folder(self, kind, limit, folder, tmp_path):
        root = pack(kind, folder, tmp_path / "packed")
        sets = [load_data(config(at), memory_limit=limit, captions=True) for at in (root, folder)]
        for own, expected in zip(*sets, strict=True):
            assert own.classes == expected.classes == ("cat", "ship") and len(own) == len(expected)
            assert own.captions == [(f"number {path.stem}",) for path in paths_of(own)]
            assert [own.classes[label] for label in own.labels] == [path.parent.name for path in paths_of(own)]
            if kind == "shards":  # of other names, and so in another order
                continue
            assert torch.equal(own.labels, expected.labels) and own.captions == expected.captions
            assert torch.equal(*(part.read(range(len(part))).pixels for part in (own, expected)))
            assert own.fingerprint() == expected.fingerprint()

    def test_all_images_are_read_at_once(self, kind, limit, folder, tmp_path):
        both, _ = load_split(config(pack(kind, folder, tmp_path / "packed")), "all", memory_limit=limit)
        found = both.read(range(len(both)))
        plain, _ = load_split(config(folder), "all")
        expected = plain.read(range(len(plain)))
        assert list(found.kept) == list(range(40)) and not found.errors
        assert sorted(map(bytes, found.pixels.numpy())) == sorted(map(bytes, expected.pixels.numpy()))


class TestReading:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["tar", "zip"])
    def test_threads_and_processes_may_read_at_once(self, kind, folder, tmp_path):
        images, _ = load_data(config(pack(kind, folder, tmp_path / "packed")), memory_limit=0)
        expected = images.read(range(len(images))).pixels
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda index: images.read([index]).pixels[0], range(len(images))))
        assert torch.equal(torch.stack(read), expected)
        loader = DataLoader(ByIndex(images), 4, num_workers=2, collate_fn=pixels_of)
        assert torch.equal(torch.cat(list(loader)), expected)
        assert torch.equal(pickle.loads(pickle.dumps(images)).read([3]).pixels[0], expected[3])

    @pytest.mark.parametrize("name", ["a.tar", "a.zip"])
    def test_no_more_is_read_than_is_asked_for(self, name, tmp_path):
        content = bytes(range(256)) * 100
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "1.png").write_bytes(content)
        archive = tmp_path / name
        pack_it = tarred if name == "a.tar" else lambda *at: zipped(*at, zipfile.ZIP_STORED)
        pack_it(tmp_path / "images", archive)
        files = Files(archive)
        (member,) = files.members.values()
        with member.open() as opened:
            assert opened.read(5) == content[:5] and opened.tell() == 5
            assert opened.seek(-3, io.SEEK_END) == len(content) - 3 and opened.read() == content[-3:]
            assert opened.seek(1000) == 1000 and opened.read(10) == content[1000:1010]
        assert member.read() == content
        whole = archive.read_bytes()
        archive.write_bytes(whole[: whole.index(content) + io.DEFAULT_BUFFER_SIZE])
        with member.open() as opened:
            assert opened.read(5) == content[:5]

    @pytest.mark.parametrize("kind", ["zip", "tar"])
    def test_archives_named_train_and_test_are_the_parts(self, kind, folder, tmp_path):
        root = tmp_path / "set"
        root.mkdir()
        if kind.startswith("zip"):
            zipped(folder, root / "train.zip")
            zipped(folder, root / "val.zip")
        else:
            for name in ("train-000", "train-001", "val_0"):
                tarred(folder, root / f"{name}.tar", prefix="")
        train_set, heldout = load_data(config(root), memory_limit=0)
        assert (len(train_set), len(heldout)) == ((40 if kind.startswith("zip") else 80), 40)
        assert train_set.classes == ("cat", "ship") and train_set.labels.float().mean() == 0.5

    @pytest.mark.slow
    def test_folders_of_an_archive_are_the_parts(self, folder, tmp_path):
        (tmp_path / "set").mkdir()
        shutil.copytree(folder, tmp_path / "set" / "train")
        shutil.copytree(folder / "cat", tmp_path / "set" / "test" / "cat")
        for archive in (zipped(tmp_path / "set", tmp_path / "set.zip"), tarred(tmp_path / "set", tmp_path / "set.tar")):
            train_set, heldout = load_data(config(archive))
            assert (len(train_set), len(heldout)) == (40, 20)
            assert train_set.classes == ("cat", "ship") and not heldout.labels.any()

    @pytest.mark.parametrize("kind", ["folder", "tar", "zip", "folder of tars"])
    def test_classes_may_lie_beside_the_images(self, kind, cifar_folder, tmp_path):
        root, expected = tmp_path / "images", {}
        root.mkdir()
        for number, name in ((10, "truck"), (3, "cat"), (2, "bird")):
            for path in sorted((cifar_folder / "test" / name).iterdir())[:5]:
                shutil.copyfile(path, root / f"{path.stem}-{name}.png")
                (root / f"{path.stem}-{name}.cls").write_text(f"{number}\n")
                expected[f"{path.stem}-{name}.png"] = str(number)
        packed = root
        if kind == "folder of tars":
            packed = tmp_path / "shards"
            packed.mkdir()
            tarred(root, packed / "000.tar")
        elif kind != "folder":
            packed = pack(kind, root, tmp_path / "packed")
        both, _ = load_split(config(packed), "all")
        assert both.classes == ("2", "3", "10")
        assert {
            path.name: both.classes[label] for path, label in zip(paths_of(both), both.labels, strict=True)
        } == expected
        next(root.glob("*.cls")).unlink()
        assert load_split(config(root), "all")[0].labels is None

    @pytest.mark.slow
    def test_an_archive_may_be_read_from_within_its_folder(self, folder, tmp_path, monkeypatch):
        packed = pack("shards", folder, tmp_path / "packed")
        expected = load_data(config(packed), captions=True)[0]
        monkeypatch.chdir(packed)
        found = load_data(config("."), captions=True)[0]
        assert torch.equal(found.pixels, expected.pixels) and found.captions == expected.captions
        monkeypatch.chdir(folder / "cat")
        assert load_data(config("."), captions=True)[0].captions

    @pytest.mark.slow
    def test_crops_are_those_of_the_folder(self, folder, tmp_path):
        cut = {"crops": 3, "resolution": 8}
        for kind in ("tar", "zip"):
            packed, plain = (load_data(config(at, **cut))[0] for at in (pack(kind, folder, tmp_path / "p"), folder))
            assert torch.equal(packed.pixels, plain.pixels)


@pytest.mark.slow
def test_entries_of_folders_are_passed_over(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.add(folder, ".")
    shutil.make_archive(str(tmp_path / "a"), "zip", folder)
    expected = load_data(config(folder))[0].pixels
    assert all(torch.equal(load_data(config(tmp_path / name))[0].pixels, expected) for name in ("a.tar", "a.zip"))


class TestDamage:
    @pytest.mark.parametrize("kind", ["zip", "zip, stored"])
    def test_a_flipped_byte_is_that_image_s(self, kind, folder, tmp_path):
        archive = pack(kind, folder, tmp_path / "packed")
        member = Files(archive).members[
            str(archive / "cat" / min(path.name for path in (folder / "cat").glob("[0-9]*.png")))
        ]
        data = bytearray(archive.read_bytes())
        data[member.offset + 60 + member.stored // 2] ^= 1
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=r"1 of 40 files cannot be read(.|\n)*packed.zip/cat/.*damaged"):
            load_data(config(archive))
        train_set, heldout = load_data(config(archive, on_bad_image="skip"))
        assert len(train_set) + len(heldout) == 39

    @pytest.mark.parametrize("kind", ["tar", "zip"])
    @pytest.mark.parametrize("keep", [0.5, 0.01])
    def test_an_archive_that_is_cut_short_is_refused(self, kind, keep, folder, tmp_path):
        archive = pack(kind, folder, tmp_path / "packed")
        data = archive.read_bytes()
        for end in (int(len(data) * keep), int(len(data) * keep) // 512 * 512):  # of a block of tar, too
            archive.write_bytes(data[:end])
            with pytest.raises(ValueError, match=f"cannot read the archive {archive}"):
                load_data(config(archive))

    def test_a_file_that_is_no_archive_is_refused(self, tmp_path):
        for name in ("a.zip", "a.tar"):
            (tmp_path / name).write_bytes(b"words" * 1000)
            with pytest.raises(ValueError, match=f"cannot read the archive {tmp_path / name}"):
                load_data(config(tmp_path / name))

    def test_an_archive_that_cannot_be_read_at_any_place_is_refused(self, folder, tmp_path):
        packed = tmp_path / "images.tar.gz"
        with tarfile.open(packed, "w:gz") as opened:
            opened.add(folder, "images")
        for root in (packed, tmp_path):
            with pytest.raises(ValueError, match=r"a compressed tar does not allow random access: pack .*gz"):
                load_data(config(root))
        shutil.copyfile(packed, tmp_path / "images.tar")
        with pytest.raises(ValueError, match=r"cannot read the archive .*images\.tar"):
            load_data(config(tmp_path / "images.tar"))

    def test_what_lies_unpacked_beside_it(self, folder, tmp_path):
        zipped(folder, tmp_path / "original.zip")
        shutil.move(tmp_path / "original.zip", folder)
        with pytest.raises(ValueError, match=r"original\.zip holds a file that also lies unpacked beside it"):
            load_data(config(folder))
        (tmp_path / "set").mkdir()
        shutil.copytree(folder / "cat", tmp_path / "set" / "train")
        tarred(folder / "ship", tmp_path / "set" / "train.tar")
        with pytest.raises(ValueError, match="train exists as a folder and as archives"):
            load_data(config(tmp_path / "set"))

    def test_links_and_ways_out(self, folder, tmp_path):
        image = next((folder / "cat").glob("[0-9]*.png"))
        (folder / "cat" / "link.png").symlink_to(image)
        with pytest.raises(ValueError, match=r"link\.png is a link; pack it with --dereference"):
            load_data(config(tarred(folder, tmp_path / "a.tar")))
        with tarfile.open(tmp_path / "b.tar", "w") as opened:
            opened.add(image, "../out.png")
        with pytest.raises(ValueError, match=r"\.\./out\.png would lie outside"):
            load_data(config(tmp_path / "b.tar"))

    def test_a_file_with_holes(self, tmp_path):
        archive = tmp_path / "a.tar"
        with tarfile.open(archive, "w") as opened:
            sparse = tarfile.TarInfo("a.png")
            sparse.type = tarfile.GNUTYPE_SPARSE
            opened.addfile(sparse)
        with pytest.raises(ValueError, match=r"a\.png has holes; pack it without --sparse"):
            load_data(config(archive))

    def test_data_that_cannot_be_unpacked(self, folder, tmp_path):
        archive = zipped(folder, tmp_path / "a.zip")
        data = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as opened:
            entry = next(entry for entry in opened.infolist() if re.search(r"/[0-9][^/]*png$", entry.filename))
        data[entry.header_offset + 30 + len(entry.filename)] = 7  # a kind of block that there is not
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=r"1 of 40 files cannot be read(.|\n)*it is damaged in the archive"):
            load_data(config(archive))

    def test_tars_put_together(self, folder, tmp_path):
        first = tarred(folder, tmp_path / "a.tar")
        first.write_bytes(2 * first.read_bytes())
        with pytest.raises(ValueError, match="it continues after its end"):
            load_data(config(first))

    def test_what_is_no_tar_after_the_end_is_passed_over(self, folder, tmp_path):
        archive = tarred(folder, tmp_path / "a.tar")
        whole = Files(archive).members
        archive.write_bytes(archive.read_bytes() + bytes(511) + b"x" * 600)
        assert Files(archive).members == whole

    def test_a_wrong_size_in_a_zip_does_not_count_where_the_checksum_is_right(self, folder, tmp_path):
        archive = zipped(folder, tmp_path / "a.zip")
        members = Files(archive).members.values()
        contents = [member.read() for member in members if member.deflated]
        larger = [replace(member, size=member.size + 2**20) for member in members if member.deflated]
        assert contents and [member.read() for member in larger] == contents

    def test_a_damaged_class_is_named(self, folder, tmp_path):
        for path in (folder / "cat").glob("[0-9]*.png"):
            path.with_suffix(".cls").write_text("3")
        archive = zipped(folder / "cat", tmp_path / "a.zip", zipfile.ZIP_STORED)
        data = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as opened:
            entry = next(entry for entry in opened.infolist() if entry.filename.endswith(".cls"))
        data[entry.header_offset + 30 + len(entry.filename)] ^= 1
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot read .*\.cls: it is damaged in the archive"):
            load_data(config(archive))

    def test_other_compressions_are_refused(self, folder, tmp_path):
        archive = zipped(folder, tmp_path / "a.zip", zipfile.ZIP_LZMA)
        with pytest.raises(ValueError, match="packed otherwise than by deflate"):
            load_data(config(archive))

    def test_an_archive_without_images_is_refused(self, tmp_path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("words")
        with pytest.raises(FileNotFoundError, match="no image below"):
            load_data(config(zipped(tmp_path / "texts", tmp_path / "a.zip")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_workers_read_each_step_of_the_folder(kind, folder, tmp_path):
    """A run of two epochs on the archive is the run on the folder."""
    read = {}
    for name, root in (("packed", pack(kind, folder, tmp_path / "archive")), ("plain", folder)):
        train_set, _ = load_data(config(root), memory_limit=0)
        batches = [
            indices.tolist() for epoch in range(2) for indices in train_set.batches(8, seed=0, epoch=epoch, start=0)
        ]
        read[name] = list(DataLoader(ByIndex(train_set), batch_sampler=batches, num_workers=2, collate_fn=pixels_of))
    assert len(read["plain"]) == 10 and all(map(torch.equal, read["packed"], read["plain"]))
