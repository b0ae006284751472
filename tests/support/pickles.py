"""Files that run code when they are read by a reader that calls what a pickle names."""

import pickle
import zipfile
from pathlib import Path

import torch

CONTAINERS = ["plain", "zip", "legacy", "zip with one entry"]
"""Forms in which some reader takes a pickle. The last is a checkpoint to one and a single pickle to another."""


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def plant(harm: Harm, path: Path, container: str = "plain", protocol: int = 2) -> None:
    """Write a checkpoint that would run."""
    content = {"encoder.conv_in.weight": harm}
    if container == "plain":
        path.write_bytes(pickle.dumps(content, protocol))
    elif container == "zip with one entry":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights", pickle.dumps(content, protocol))
    else:
        new = container == "zip"
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
