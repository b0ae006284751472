"""Files of unknown origin are read within limits and run nothing; what they are instead is said."""

import functools
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image, UnidentifiedImageError
from support.pickles import CONTAINERS, Harm, plant

from diffusers_vae.images.files import read_image
from diffusers_vae.settings import MAX_NODES, read_yaml
from diffusers_vae.untrusted import check_type, load_pickle, open_image, open_regular, read_json, read_text


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def planted():
    import planted_module

    return planted_module


@pytest.fixture
def written(tmp_path):
    """Write a file of this content; its path."""

    def write(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestRegular:
    @pytest.mark.skipif(os.name == "nt", reason="needs mkfifo")
    @pytest.mark.parametrize("read", [open_regular, read_text, read_json, read_yaml])
    def test_a_pipe_is_refused_at_once(self, read, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="pipe must be a regular file"):
            read(tmp_path / "pipe")

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
    def test_a_device_without_end_is_refused(self, tmp_path):
        (tmp_path / "link").symlink_to("/dev/zero")
        with pytest.raises(ValueError, match="link must be a regular file"):
            read_text(tmp_path / "link")

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs sockets in the file system")
    def test_a_socket_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # its path must be short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket")
            with pytest.raises((OSError, ValueError), match="socket"):
                open_regular(Path("socket"))

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="must be a file, got a folder"):
            read_text(tmp_path)


class TestImages:
    def test_formats_that_start_other_programs_are_not_read(self, written):
        """Ghostscript runs what an EPS holds; the name does not matter."""
        path = written("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "a.png")
        with Image.open(path) as read_by_pillow:
            assert read_by_pillow.format == "EPS"
        with open(path, "rb") as file, pytest.raises(UnidentifiedImageError):
            open_image(file)
        with pytest.raises(ValueError, match=rf"cannot read the image {path}"):
            read_image(path, 3)

    @pytest.mark.parametrize("name", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
    def test_usual_formats_are_read(self, name, tmp_path):
        Image.new("RGB", (4, 3)).save(tmp_path / "a", name)
        with open(tmp_path / "a", "rb") as file, open_image(file) as image:
            assert image.size == (4, 3)


class TestText:
    def test_utf8_with_a_byte_order_mark_or_without(self, written):
        for mark in (b"", b"\xef\xbb\xbf"):
            assert read_text(written(mark + "Zürich ✓\n".encode())) == "Zürich ✓\n"

    @pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
    def test_other_encodings_are_named(self, read, written):
        path = written("name: Zürich".encode("latin-1"))
        with pytest.raises(ValueError, match=rf"{path} must be UTF-8 text, got the byte 0xfc at offset 7"):
            read(path)

    def test_at_most_so_much_is_read(self, written):
        assert read_text(written("x" * 10), limit=10) == "x" * 10
        with pytest.raises(ValueError, match="must hold at most 10 bytes of text, got more"):
            read_text(written("x" * 11), limit=10)


class TestJson:
    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not valid JSON: Expecting"), ("[" * 100_000, "nested too deeply"), ("", "not valid JSON")],
    )
    def test_damage_names_the_file(self, text, message, written):
        path = written(text)
        with pytest.raises(ValueError, match=rf"{path} is damaged.*{message}"):
            read_json(path)


@dataclass
class Point:
    x: float
    names: list[str]
    inner: "Point | None" = None
    sizes: dict[str, int] = field(default_factory=dict)


class TestTypes:
    def test_values_of_the_type(self):
        for value in ({"x": 1, "names": []}, {"x": 0.5, "names": ["a"], "inner": {"x": -1e9, "names": []}}):
            check_type(value | {"sizes": {"a": 1}, "more": []}, Point, "file")
        check_type({"a": [{"b": None}], "c": "x"}, {"a": [{"b": int | None}], "c": Literal["x", "y"]}, "file")

    @pytest.mark.parametrize(
        ("value", "kind", "message"),
        [
            ([], Point, "^file must be of the type object, got"),
            ({"names": []}, Point, "^file lacks x"),
            ({"x": "1", "names": [], "sizes": {}}, Point, r"^file\.x must be of the type number, got '1'"),
            ({"x": True, "names": [], "sizes": {}}, Point, r"^file\.x must be of the type number, got True"),
            ({"x": float("nan"), "names": [], "sizes": {}}, Point, r"^file\.x must be a finite number, got nan"),
            ({"x": 10**400, "names": [], "sizes": {}}, Point, r"^file\.x must be a finite number, got 1000"),
            ({"x": 1, "names": "a", "sizes": {}}, Point, r"^file\.names must be of the type array, got 'a'"),
            ({"x": 1, "names": ["a", 2], "sizes": {}}, Point, r"^file\.names\[1\] must be of the type string, got 2"),
            ({"x": 1, "names": [], "inner": 3, "sizes": {}}, Point, r"^file\.inner must be of the type object, got 3"),
            ({"x": 1, "names": [], "sizes": {"a": 1.5}}, Point, r"^file\.sizes\[a\] must be of the type integer"),
            ({"a": []}, {"a": Literal["x", "y"]}, r"^file\.a must be one of x, y, got \[\]"),
        ],
    )
    def test_others_are_named(self, value, kind, message):
        with pytest.raises(ValueError, match=message):
            check_type(value, kind, "file")


class TestYaml:
    def test_values_are_what_people_mean(self, written):
        text = "a: 1e-4\nb: 2024-01-01\nc: .5\nd: 1_000\ne: -3\nf: true\ng: [1.0, x]\nh: 0\ni: null\nj: 1e5\nk: .inf\n"
        assert read_yaml(written(text)) == {
            "a": 1e-4, "b": "2024-01-01", "c": 0.5, "d": 1000, "e": -3, "f": True, "g": [1.0, "x"], "h": 0, "i": None,
            "j": 1e5, "k": float("inf"),
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nb: 1:30", "line 2: write a number without leading zeros or colons, or a text in quotes, got 1:30"),
            ("a: 020", "without leading zeros or colons, or a text in quotes, got 020"),
            ("a: {b: 1, b: 2}", "line 1: the key b is given twice"),
            ("a: &x [1]\nb: *x", r"line 2: aliases \(\*name\) are not allowed"),
            ("a: [", "line 1: expected the node content"),
            ("a: !!python/object/apply:os.system [x]", "could not determine a constructor for the tag"),
            ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
            ("a: !!binary aGk=", "could not determine a constructor for the tag"),
            ("a: !!set {b}", "could not determine a constructor for the tag"),
            ("[" * 5000, "nested too deeply"),
            ("a: \x00", "damaged, not valid YAML: unacceptable character"),
            pytest.param(
                "- \n" * (MAX_NODES + 1), "must hold at most 100,000 values, got more", marks=pytest.mark.slow
            ),
        ],
    )
    def test_traps_and_damage_are_named(self, text, message, written):
        path = written(text)
        with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
            read_yaml(path)


class TestPickle:
    def test_tensors_are_read_in_every_way(self, tmp_path):
        for legacy in (False, True):
            torch.save({"a": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
            with open(tmp_path / "a.pt", "rb") as file:
                read = [load_pickle(tmp_path / "a.pt"), load_pickle(tmp_path / "a.pt", file)]
            read += [] if legacy else [load_pickle(tmp_path / "a.pt", mmap=True)]
            assert all(content["a"].tolist() == [0, 1, 2] for content in read)

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_code_is_refused_and_not_run(self, container, protocol, tmp_path):
        path = tmp_path / "a.pt"
        plant(Harm(tmp_path / "harm"), path, container, protocol)
        said = (
            "not a torch checkpoint"
            if container == "zip with one entry"
            else "a pickle that .* is refused. If you trust it"
        )
        with pytest.raises(ValueError, match=rf"^{path} is {said}") as error:
            load_pickle(path)
        assert "weights_only" not in str(error.value) and not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("container", ["zip", "legacy"])
    @pytest.mark.parametrize(
        ("harm", "taken"),
        [
            (lambda code: Call(eval, code), True),
            (lambda code: Call(exec, code), True),
            (lambda code: Call(torch.hub.load, code, "model"), True),
            (lambda code: Call(subprocess.call, ["sh", "-c", code]), True),
            (lambda code: object.__new__(subprocess.Popen), True),
            (lambda code: {Call(eval, code): Call(functools.partial, eval)}, True),
            (lambda code: planted().Evil(), True),
            (lambda code: planted().touch, True),
            (lambda code: Call(os.system, f"touch {code}"), False),
            (lambda code: Call(Path.touch, Path(code)), False),  # getattr(Path, "touch"), and a call of what it gives
        ],
    )
    def test_foreign_classes_beside_tensors_are_named_and_no_more(self, harm, taken, container, tmp_path, monkeypatch):
        """Neither REDUCE, NEWOBJ nor BUILD of a pickle calls anything, and no module is imported."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        text = "import os\nopen('harm', 'w')\ndef touch(): pass\nclass Evil:\n"
        text += "    def __init__(self): self.a = 1\n    def __setstate__(self, state): open('harm', 'w')\n"
        (tmp_path / "planted_module.py").write_text(text)
        content = {"a": torch.arange(3), "more": harm("open('harm', 'w')"), "b": {"c": torch.ones(2)}}
        torch.save(content, "a.pt", _use_new_zipfile_serialization=container == "zip")
        sys.modules.pop("planted_module", None)
        Path("harm").unlink(missing_ok=True)
        try:
            found = load_pickle(Path("a.pt"), foreign=True)
            assert taken and found["a"].tolist() == [0, 1, 2] and found["b"]["c"].tolist() == [1, 1]
        except ValueError as error:
            assert not taken and re.search("^a.pt is a pickle that holds code.* and is refused", str(error))
        assert not Path("harm").exists() and "planted_module" not in sys.modules
        with pytest.raises(ValueError, match="holds code"):
            load_pickle(Path("a.pt"))

    @pytest.mark.parametrize("id", ["'module', 'builtins.eval', 'a.py', 'x'", "'storage', 1, '0', 'cpu', 1", "1"])
    def test_persistent_ids_of_anything_but_storages_are_refused(self, id, tmp_path):
        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                return eval(f"({id})") if value is Harm else None

        stream = io.BytesIO()
        Pickler(stream, 2).dump({"a": Harm})
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name, part in {"data.pkl": stream.getvalue(), "version": b"3\n", "byteorder": b"little"}.items():
                archive.writestr(f"archive/{name}", part)
        with pytest.raises(ValueError, match=r"a\.pt is not a torch checkpoint"):
            load_pickle(tmp_path / "a.pt", foreign=True)

    def test_endless_names_are_refused(self, tmp_path):
        names = b"".join(b"c%s\nx\n" % f"module{number}".encode() for number in range(1000))
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02(" + names + b"t.")
            archive.writestr("archive/version", b"3\n")
        with pytest.raises(ValueError, match=r"holds code, module64\.x, and is refused"):
            load_pickle(tmp_path / "a.pt", foreign=True)

    def test_what_was_cut_off_is_said_to_be(self, tmp_path):
        torch.save({"a": torch.arange(3)}, tmp_path / "whole.pt")
        whole = (tmp_path / "whole.pt").read_bytes()
        for length in (0, 10, 300, len(whole) - 100):
            (tmp_path / "a.pt").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"a.pt is not a torch checkpoint, or is truncated: \S"):
                load_pickle(tmp_path / "a.pt")
