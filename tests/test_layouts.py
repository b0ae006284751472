"""Sets of images as people have them: which images are trained on and which are held out, judged by their pixels, and
their labels and captions.
"""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from support.hub import connect
from support.runs import fit, tiny

from diffusers_vae import VAE, cli
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.data.parts import part_of, split_of
from diffusers_vae.settings import Settings
from diffusers_vae.tasks.text_to_image_config import TextToImageConfig

SIDE = 32
MOST = 40
"""Images of a layout."""
UNPARTED = "used for training despite the name of a part"


@dataclass(frozen=True)
class Layout:
    """Where files lie, and what is expected of them."""

    files: str
    """A line per group of files: a path with {} for the number, how many, training, held-out, unused or cut (of a set
    without parts), the label or -, and the caption, if there is one, with {} for the number."""
    texts: dict[str, str] = field(default_factory=dict)
    """Other files, and what they hold."""
    then: Callable[[Path], object] = lambda root: None
    """Changes the folder after all files were written."""
    root: str = ""
    """data.root below the folder."""
    notes: tuple[str, ...] = ()
    """What is logged before a training."""


def beside(suffix: str, text: Callable[[str], str] = str) -> Callable[[Path], None]:
    """Write a file with the caption beside each image: `captions` of the images are `text` of their numbers."""

    def write(root: Path) -> None:
        for path in [path for path in root.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".webp")]:
            path.with_suffix(suffix).write_text(text(path.stem), encoding="utf-8")

    return write


def table(name: str, key: str, *others: str) -> Callable[[Path], None]:
    """Write a metadata file at `name`, with the captions `a photo, NUMBER` of the images at and below it."""

    def write(root: Path) -> None:
        at = root / name
        names = [path.relative_to(at.parent).as_posix() for path in sorted(at.parent.rglob("*.*"))]
        rows = [{"file_name": file, key: f"a photo, {Path(file).stem}"} | dict.fromkeys(others, "x") for file in names]
        with at.open("w", encoding="utf-8", newline="") as file:
            if at.suffix == ".csv":
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    return write


def packed(*archives: str) -> Callable[[Path], None]:
    """Pack each folder into the archive of its name."""

    def write(root: Path) -> None:
        for archive in archives:
            folder = (root / archive).with_suffix("")
            files = [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*"))]
            if archive.endswith(".zip"):
                with zipfile.ZipFile(root / archive, "w") as opened:
                    for path, name in files:
                        opened.write(path, name)
            else:
                with tarfile.open(root / archive, "w") as opened:
                    for path, name in files:
                        opened.add(path, name, recursive=False)
            shutil.rmtree(folder)

    return write


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for step in steps:
            step(root)

    return write


def comfy(root: Path) -> None:
    """Write the workflow into the files, as ComfyUI does."""
    from PIL.PngImagePlugin import PngInfo

    for path in root.rglob("*.png"):
        info = PngInfo()
        info.add_text("prompt", json.dumps({"3": {"inputs": {"text": "a photo"}}}))
        with Pillow.open(path) as image:
            image.load()
        image.save(path, pnginfo=info)


LAYOUTS = {
    # plain folders
    "phone photographs": Layout(
        """DCIM/100APPLE/IMG_{}.jpg 5 cut 100APPLE
        DCIM/101APPLE/IMG_{}.JPG 4 cut 101APPLE""",
        {"DCIM/100APPLE/IMG_1.MOV": "no image", "DCIM/.thumbnails/1.jpg": "no image"},
    ),
    "web images": Layout("image_{}.webp 6 cut -\nphoto{}.jpeg 3 cut -\nIMG{}.BMP 2 cut -"),
    "one class": Layout("cats/{}.png 8 cut -"),
    "CelebA of Kaggle": Layout(
        "img_align_celeba/img_align_celeba/{}.jpg 9 cut -",
        {"list_eval_partition.csv": "image_id,partition\n000001.jpg,0\n", "list_attr_celeba.csv": "image_id\n"},
    ),
    "PetImages of Kaggle": Layout("PetImages/Cat/{}.jpg 5 cut Cat\nPetImages/Dog/{}.jpg 5 cut Dog"),
    "ComfyUI": Layout("output/ComfyUI_{}_.png 7 cut -", then=comfy),
    "medical PNG": Layout(
        "images_001/images/{}.png 5 cut images_001\nimages_002/images/1{}.png 5 cut images_002",
        {"Data_Entry_2017.csv": "Image Index,Finding Labels\n", "train_val_list.txt": "0.png\n"},
    ),
    "TIFF of a microscope": Layout("BBBC006_v1_images/mcf-z-stacks-{}.tif 9 cut -"),
    # parts in folders
    "torchvision": Layout(
        """train/cat/{}.png 4 training cat
        train/dog/{}.png 4 training dog
        test/cat/{}.png 2 held-out cat
        test/dog/{}.png 2 held-out dog"""
    ),
    "BSDS500": Layout(
        "train/{}.jpg 5 training -\nval/{}.jpg 3 held-out -\ntest/{}.jpg 4 unused -", notes=("unused, .*: test/ in",)
    ),
    "BSDS500, whole": Layout(
        """BSDS500/data/images/train/{}.jpg 5 training -
        BSDS500/data/images/val/{}.jpg 3 held-out -
        BSDS500/data/images/test/{}.jpg 4 unused -""",
        {"BSDS500/data/groundTruth/train/1.mat": "", "BSDS500/data/images/train/Thumbs.db": ""},
        notes=("unused, .*: images/test/ in",),
    ),
    "chest X-rays of Kaggle": Layout(
        """chest_xray/train/NORMAL/{}.jpeg 3 training NORMAL
        chest_xray/train/PNEUMONIA/{}.jpeg 4 training PNEUMONIA
        chest_xray/val/NORMAL/{}.jpeg 1 held-out NORMAL
        chest_xray/val/PNEUMONIA/{}.jpeg 1 held-out PNEUMONIA
        chest_xray/test/NORMAL/{}.jpeg 3 unused -
        chest_xray/chest_xray/train/NORMAL/{}.jpeg 2 unused -""",
        {"chest_xray/__MACOSX/._train": ""},
        notes=("unused, .*: chest_xray/, test/ in",),
    ),
    "brain tumours of Kaggle": Layout(
        """Training/glioma/{}.jpg 3 training glioma
        Training/notumor/{}.jpg 3 training notumor
        Testing/glioma/{}.jpg 2 held-out glioma
        Testing/notumor/{}.jpg 2 held-out notumor"""
    ),
    "Intel scenes of Kaggle": Layout(
        """seg_train/seg_train/sea/{}.jpg 3 training sea
        seg_train/seg_train/street/{}.jpg 3 training street
        seg_test/seg_test/sea/{}.jpg 2 held-out sea
        seg_test/seg_test/street/{}.jpg 2 held-out street
        seg_pred/seg_pred/{}.jpg 3 unused -""",
        notes=("unused, .*: seg_pred/ in",),
    ),
    "cats and dogs of Kaggle": Layout(
        "train/train/cat.{}.jpg 4 training -\ntrain/train/dog.{}.jpg 4 training -\ntest1/test1/{}.jpg 4 held-out -",
        {"sampleSubmission.csv": "id,label\n"},
    ),
    "fisheries of Kaggle": Layout(
        "train/ALB/{}.jpg 4 training ALB\ntrain/BET/{}.jpg 4 training BET\ntest_stg1/{}.jpg 4 held-out -"
    ),
    "fruits of Kaggle": Layout(
        """fruits-360/Training/Apple 1/{}.jpg 3 training Apple 1
        fruits-360/Training/Kiwi/{}.jpg 3 training Kiwi
        fruits-360/Test/Apple 1/{}.jpg 2 held-out Apple 1
        fruits-360/Test/Kiwi/{}.jpg 2 held-out Kiwi
        fruits-360/test-multiple_fruits/{}.jpg 2 unused -""",
        notes=("unused, .*: test-multiple_fruits/ in",),
    ),
    "Training Set and Test Set": Layout("Training Set/{}.png 6 training -\nTest Set/{}.png 3 held-out -"),
    "TRAIN and TEST": Layout("TRAIN/{}.png 6 training -\nTEST/{}.png 3 held-out -"),
    "hive": Layout("split=train/{}.png 6 training -\nsplit=test/{}.png 3 held-out -"),
    "held_out": Layout("train_images/{}.png 6 training -\nheld_out_images/{}.png 3 held-out -"),
    "Roboflow, objects": Layout(
        """train/images/{}_jpg.rf.abc.jpg 5 training -
        valid/images/{}_jpg.rf.abc.jpg 2 held-out -
        test/images/{}_jpg.rf.abc.jpg 2 unused -""",
        {
            "data.yaml": "train: ../train/images\n",
            "README.roboflow.txt": "words",
            "train/labels/0_jpg.rf.abc.txt": "0 0.5 0.5 0.1 0.1\n",
        },
        notes=("unused, .*: test/ in",),
    ),
    "Roboflow, classes": Layout(
        """train/daisy/{}.jpg 3 training daisy
        train/rose/{}.jpg 3 training rose
        valid/daisy/{}.jpg 2 held-out daisy
        test/rose/{}.jpg 2 unused -""",
        notes=("unused, .*: test/ in",),
    ),
    "Darknet": Layout(
        "train/{}.jpg 4 training -\nvalid/{}.jpg 2 held-out -",
        then=beside(".txt", lambda stem: "" if stem == "0" else "0 0.5 0.5 0.25 0.125\n1 0.1 0.2 0.3 0.4"),
        notes=("hold numbers, .* not captions: 4 files such as",),
    ),
    "YOLO": Layout(
        """datasets/coco/images/train2017/{}.jpg 5 training -
        datasets/coco/images/val2017/{}.jpg 3 held-out -
        datasets/coco/images/test2017/{}.jpg 2 unused -""",
        {"datasets/coco/labels/train2017/0.txt": "0 0.5 0.5 0.1 0.1\n", "datasets/coco/train2017.txt": "./images\n"},
        notes=("unused, .*: images/test2017/ in",),
    ),
    "COCO": Layout(
        "train2017/{}.jpg 5 training -\nval2017/{}.jpg 3 held-out -\ntest2017/{}.jpg 2 unused -",
        {"annotations/captions_train2017.json": "{}", "annotations/instances_train2017.json": "{}"},
        notes=("unused, .*: test2017/ in", "look like captions .*captions_train2017.json$"),
    ),
    "PASCAL VOC": Layout(
        """VOCtrainval/JPEGImages/{}.jpg 5 training -
        VOCtest/JPEGImages/{}.jpg 3 held-out -""",
        {"VOCtrainval/Annotations/0.xml": "<annotation/>"},
    ),
    "ImageNet": Layout(
        """ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_{}.JPEG 4 training n01440764
        ILSVRC/Data/CLS-LOC/train/n01443537/n01443537_{}.JPEG 4 training n01443537
        ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{}.JPEG 3 held-out -
        ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_{}.JPEG 2 unused -""",
        {"LOC_synset_mapping.txt": "n01440764 tench\n", "ILSVRC/Annotations/CLS-LOC/val/1.xml": "<annotation/>"},
        notes=("unused, .*test/",),
    ),
    "Tiny ImageNet": Layout(
        """tiny-imagenet-200/train/n01443537/images/{}.JPEG 4 training n01443537
        tiny-imagenet-200/train/n01629819/images/{}.JPEG 4 training n01629819
        tiny-imagenet-200/val/images/val_{}.JPEG 3 held-out -
        tiny-imagenet-200/test/images/test_{}.JPEG 2 unused -""",
        {"tiny-imagenet-200/val/val_annotations.txt": "val_0.JPEG\tn01443537\n"},
        notes=("unused, .*: test/ in",),
    ),
    "LSUN": Layout(
        """bedroom_train/{}.webp 4 training -
        bedroom_val/{}.webp 2 held-out -
        church_outdoor_train/{}.webp 4 training -
        church_outdoor_val/{}.webp 2 held-out -"""
    ),
    "DIV2K": Layout("DIV2K_train_HR/{}.png 6 training -\nDIV2K_valid_HR/{}.png 3 held-out -"),
    "CycleGAN": Layout(
        """horse2zebra/trainA/{}.jpg 4 training -
        horse2zebra/trainB/{}.jpg 4 training -
        horse2zebra/testA/{}.jpg 2 held-out -
        horse2zebra/testB/{}.jpg 2 held-out -"""
    ),
    "MVTec AD": Layout(
        """bottle/train/good/{}.png 4 training bottle
        bottle/test/broken/{}.png 2 held-out bottle
        bottle/ground_truth/broken/{}_mask.png 2 unused -
        cable/train/good/{}.png 4 training cable
        cable/test/good/{}.png 2 held-out cable""",
        notes=("unused, .*: bottle/ground_truth/ in",),
    ),
    "two sets": Layout(
        """cifar/train/cat/{}.png 3 training cifar
        cifar/test/cat/{}.png 2 held-out cifar
        flowers/trn/{}.jpg 3 training flowers
        flowers/dev/{}.jpg 2 held-out flowers
        own/{}.png 3 training own"""
    ),
    "parts by file names": Layout("train_{}.png 6 training -\ntest_{}.png 3 held-out -"),
    "three parts by file names": Layout(
        "train_{}.png 6 training -\nval_{}.png 3 held-out -\ntest_{}.png 2 unused -", notes=("unused, .*: test_0, ",)
    ),
    "images beside parts": Layout(
        "train/{}.png 6 training -\ntest/{}.png 3 held-out -\n{}.png 2 unused -", notes=("unused, .* images in .*s$",)
    ),
    "images beside parts of one of two sets": Layout(
        """cifar/train/{}.png 3 training cifar
        cifar/test/{}.png 2 held-out cifar
        cifar/{}.png 2 unused -
        own/{}.png 3 training own""",
        notes=("unused, .* images in .*cifar$",),
    ),
    "classes named like parts": Layout(
        """test_tube/{}.png 4 cut test_tube
        training_shoes/{}.png 4 cut training_shoes
        value/{}.png 2 cut value
        contest/{}.png 2 cut contest""",
        notes=(f"{UNPARTED}.*: test_tube/, training_shoes/ in",),
    ),
    "photographs of a test": Layout(
        "2020/Paris/{}.jpg 4 cut 2020\n2020/test/{}.jpg 2 cut 2020\n2021/Rome/{}.jpg 4 cut 2021",
        notes=(f"{UNPARTED}.*: 2020/test/ in",),
    ),
    # archives
    "timm shards": Layout(
        """imagenet-train-0000/{}.jpg 4 training -
        imagenet-train-0001/1{}.jpg 4 training -
        imagenet-validation-0000/{}.jpg 3 held-out -""",
        then=packed("imagenet-train-0000.tar", "imagenet-train-0001.tar", "imagenet-validation-0000.tar"),
    ),
    "WebDataset with classes": Layout(
        """cifar-train-000000/{}.png 4 training 3
        cifar-train-000001/1{}.png 4 training 5
        cifar-test-000000/{}.png 3 held-out 3""",
        {f"cifar-train-000000/{n}.cls": "3" for n in range(4)}
        | {f"cifar-train-000001/1{n}.cls": "5" for n in range(4)}
        | {f"cifar-test-000000/{n}.cls": "3" for n in range(3)},
        then=packed("cifar-train-000000.tar", "cifar-train-000001.tar", "cifar-test-000000.tar"),
    ),
    "img2dataset": Layout(
        "00000/00000000{}.jpg 4 cut - a photo {}\n00001/00001000{}.jpg 4 cut - a photo {}",
        {"00000_stats.json": '{"count": 4}'},
        then=both(
            beside(".json", lambda stem: json.dumps({"caption": f"a photo {stem[-1]}", "url": "x"})),
            beside(".txt", lambda stem: f"a photo {stem[-1]}"),
            packed("00000.tar", "00001.tar"),
        ),
    ),
    "one zip of Kaggle": Layout(
        """archive/data/Train/cat/{}.png 3 training cat
        archive/data/Train/dog/{}.png 3 training dog
        archive/data/Val/cat/{}.png 2 held-out cat""",
        then=packed("archive.zip"),
        root="archive.zip",
    ),
    "zips of Kaggle": Layout(
        "train/{}.jpg 6 training -\ntest/{}.jpg 3 held-out -",
        {"sample_submission.csv": "id\n"},
        then=packed("train.zip", "test.zip"),
    ),
    "parts within shards": Layout(
        "a-0/train/x/{}.png 3 training x\na-1/train/y/{}.png 3 training y\na-1/test/x/{}.png 2 held-out x",
        then=packed("a-0.tar", "a-1.tar"),
    ),
    # captions
    "kohya": Layout(
        "img/10_sks dog/{}.png 5 cut 10_sks dog photo of {}\nimg/5_cat/1{}.png 3 cut 5_cat photo of 1{}",
        then=beside(".caption", "photo of {}".format),
    ),
    "kohya, tags": Layout("40_dog/{}.png 8 cut - 1dog, solo, {}", then=beside(".txt", "1dog, solo, {}".format)),
    "texts of Windows": Layout("{}.JPG 8 cut - a dog, {}", then=beside(".TXT", "a dog, {}".format)),
    "kohya, JSON of all": Layout(
        "{}.png 8 cut -", {"meta_cap.json": '{"0": {"caption": "a"}}'}, notes=("look like captions .*meta_cap.json$",)
    ),
    "OneTrainer": Layout(
        "concept/{}.jpg 8 cut - a photo, {}", then=beside(".txt", lambda stem: f"\n  a photo, {stem}\n")
    ),
    "imagefolder, CSV": Layout(
        "train/{}.png 6 training - a photo, {}\nvalidation/{}.png 2 held-out - a photo, {}",
        then=both(table("train/metadata.csv", "text"), table("validation/metadata.csv", "text")),
    ),
    "imagefolder, prompt": Layout("{}.png 8 cut - a photo, {}", then=table("metadata.jsonl", "prompt", "id")),
    "imagefolder, text before caption": Layout(
        "{}.png 8 cut - a photo, {}", then=table("metadata.jsonl", "text", "caption", "prompt")
    ),
    "imagefolder, another column": Layout(
        "{}.png 8 cut -",
        then=table("metadata.csv", "description"),
        notes=("no captions in .*metadata.csv, which has none of text, caption, prompt, but description, file_name",),
    ),
    "JSON beside images": Layout(
        "{}.jpg 8 cut - a photo, {}", then=beside(".json", lambda stem: json.dumps({"prompt": f"a photo, {stem}"}))
    ),
    "labelme": Layout(
        "{}.jpg 8 cut -",
        then=beside(".json", lambda stem: json.dumps({"shapes": []})),
        notes=("look like captions .*8 files such as .*json$",),
    ),
    "tags of a booru": Layout(
        "{}.png 8 cut -", then=beside(".tags"), notes=("look like captions .*8 files such as .*0.tags$",)
    ),
    "metadata beside a zip": Layout(
        "photos/{}.jpg 8 cut - a photo, {}",
        then=both(
            table("photos/metadata.jsonl", "text"),
            lambda root: shutil.move(root / "photos" / "metadata.jsonl", root),
            packed("photos.zip"),
        ),
    ),
    "metadata in a zip": Layout(
        "photos/{}.jpg 8 cut - a photo, {}",
        then=both(table("photos/metadata.csv", "caption"), packed("photos.zip")),
        root="photos.zip",
    ),
    "metadata of another table": Layout(
        "{}.png 8 cut -", {"metadata.csv": "patient,age\n1,63\n"}, notes=("look like captions .*metadata.csv$",)
    ),
}


@pytest.fixture(scope="module")
def images(shared_data) -> list[np.ndarray]:
    """Photographs of CIFAR-10, uint8 (32, 32, 3), each another."""
    found = []
    with tarfile.open(shared_data / "cifar10-5k.tar") as archive:
        while len(found) < MOST:
            member = archive.next()
            if member.name.endswith(".png"):
                found.append(np.asarray(Pillow.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")))
    return found


def build(layout: Layout, root: Path, images: list[np.ndarray]) -> dict[bytes, tuple[str, str, str | None, str | None]]:
    """Write the files. Part, name, label and caption of each image, by its pixels."""
    known, left = {}, iter(images)
    root.mkdir(parents=True)
    for line in layout.files.splitlines():
        template, rest = next(
            (line.strip()[: line.strip().index(suffix) + len(suffix)], line.strip().split(suffix, 1)[1])
            for suffix in (".jpg ", ".JPG ", ".jpeg ", ".JPEG ", ".png ", ".webp ", ".BMP ", ".tif ")
            if suffix in line
        )
        count, part, *about = rest.split(maxsplit=2)
        label, caption = split_about(about[0], template)
        for number in range(int(count)):
            path = root / template.strip().format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            options = {"lossless": True} if path.suffix == ".webp" else {}
            Pillow.fromarray(next(left)).save(path, **options)
            with Pillow.open(path) as image:
                pixels = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0).tobytes()
            known[pixels] = (part, path.name, label, caption and caption.format(number))
    for name, text in layout.texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    layout.then(root)
    return known


def split_about(text: str, template: str) -> tuple[str | None, str | None]:
    """Label and caption: a label with spaces is a folder's name."""
    folders = [folder for folder in template.split("/")[:-1] if text == folder or text.startswith(f"{folder} ")]
    label = max(folders, key=len) if folders else text.split()[0]
    return (None if label == "-" else label), text[len(label) :].strip() or None


def found_in(images) -> list[bytes]:
    read = images.read(range(len(images)))
    return [bytes(pixels.numpy()) for pixels in read.pixels]


def check(config: DataConfig, known: dict, split: bool) -> None:
    """Each image is in its part, with its label and captions."""
    train, heldout = load_data(config, progress=True, captions=True)
    seen = {}
    for name, part in (("training", train), ("held-out", heldout)):
        for index, pixels in enumerate(found_in(part)):
            expected, file, label, caption = known[pixels]
            assert pixels not in seen and expected in (name, "cut"), f"{file}, {expected}, is in the {name} part"
            assert label == (None if part.labels is None else part.classes[part.labels[index]]), file
            assert caption == (None if part.captions is None else part.captions[index][0]), file
            seen[pixels] = name
    assert {*seen} == {pixels for pixels, about in known.items() if about[0] != "unused"}
    assert len(heldout) == (sum(about[0] == "held-out" for about in known.values()) if split else 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_and_archives(name, images, tmp_path, caplog):
    layout = LAYOUTS[name]
    root = tmp_path / "photos"
    known = build(layout, root, images)
    check(config(root / layout.root), known, split=any(about[0] == "held-out" for about in known.values()))
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_vae")]
    assert len(logged) == len(layout.notes) and all(map(re.search, layout.notes, logged)), logged


def test_share_to_hold_out_of_a_set_with_parts_is_not_ignored_silently(images, tmp_path, caplog):
    build(Layout("train/{}.png 6 training -\ntest/{}.png 3 held-out -"), tmp_path / "photos", images)
    load_data(dataclasses.replace(config(tmp_path / "photos"), heldout_fraction=0.25), progress=True)
    (logged,) = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_vae")]
    assert logged == "data.heldout_fraction 0.25 is not used, because the set has a held-out part"


def config(root: Path, name: str = "folder") -> DataConfig:
    return DataConfig(name=name, root=str(root), channels=3, resolution=SIDE, num_workers=0)


ROWS = [
    ({"Train.npy": "training", "Test.npy": "held-out"}, ()),
    ({"x_train.npy": "training", "x_test.npy": "held-out"}, ()),
    ({"imgs_trn_0.npy": "training", "imgs_trn_1.npy": "training", "imgs_val_0.npy": "held-out"}, ()),
    ({"train.npy": "training", "val.npy": "held-out", "test.npy": "unused"}, ("unused, .*: test.npy",)),
    ({"test_tube.npy": "cut", "beaker.npy": "cut"}, None),
    ({"Training.parquet": "training", "Testing.parquet": "held-out"}, ()),
    ({"data/TRAIN/0.parquet": "training", "data/TEST/0.parquet": "held-out"}, ()),
    (
        {"train-0.parquet": "training", "validation-0.parquet": "held-out", "test-0.parquet": "unused"},
        ("unused, .*: test",),
    ),
    ({"0000.parquet": "cut", "0001.parquet": "cut"}, ()),
    (
        {"splits/train2017": "training", "splits/val2017": "held-out", "splits/test2017": "unused"},
        ("unused, .*: test2017",),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("files", "notes"), ROWS)
def test_arrays_and_rows(files, notes, images, tmp_path, caplog, monkeypatch):
    connect(monkeypatch, None, tmp_path / "cache")
    known, left, splits = {}, iter(images), DatasetDict()
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "prompt": Value("string")})
    labelled = not next(iter(files)).endswith(".npy")
    for name, part in files.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        own = [next(left) for _ in range(4)]
        about = ("cat", f"from {name}") if labelled else (None, None)
        known |= {np.moveaxis(image, -1, 0).tobytes(): (part, name, *about) for image in own}
        if path.suffix == ".npy":
            np.save(path, np.stack(own))
            continue
        columns = {"image": [Pillow.fromarray(image) for image in own], "label": [0] * 4, "prompt": [about[1]] * 4}
        splits[path.name] = Dataset.from_dict(columns, features)
        if path.suffix:
            splits[path.name].to_parquet(path)
    root = tmp_path / "set"
    if "splits/train2017" in files:
        splits.save_to_disk(root)
    if notes is None:
        with pytest.raises(ValueError, match="not clear what to train on"):
            load_data(config(root, "array"))
        return
    check(config(root, "datasets" if labelled else "array"), known, split="held-out" in files.values())
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_vae")]
    assert len(logged) == len(notes) and all(map(re.search, notes, logged)), logged


class TestNames:
    @pytest.mark.parametrize(
        ("name", "word"),
        [
            *[("train2017", "train"), ("TRAIN", "train"), ("Training Set", "training"), ("trainset", "train")],
            *[("imagenet-val-0003", "val"), ("cifar_test", "test"), ("TestSet", "test"), ("split=test", "test")],
            *[("trainA", "train"), ("VOCtest", "test"), ("MNISTTrain", "train"), ("test1", "test"), ("dev", "dev")],
            *[("train_val", "trainval"), ("held-out", "heldout"), ("held out", "heldout"), ("eval.", "eval")],
            *[(name, None) for name in ("value", "valley", "contest", "CONTEST", "latest", "Latest", "detrain")],
            *[(name, None) for name in ("ätest", "device", "Strain", "evaluate", "train_test_split", "2017", "")],
        ],
    )
    def test_words(self, name, word):
        part = part_of(name)
        assert (part and part.word) == word

    @pytest.mark.parametrize(
        ("names", "training", "heldout"),
        [
            (["test", "train", "val"], ["train"], ["val"]),
            (["train", "test", "validation", "val"], ["train"], ["validation"]),
            (["train", "Training", "test", "Val"], ["train"], ["test"]),  # as before there were other words
            (["train", "train_sft", "test", "test_sft"], ["train"], ["test"]),
            (["trainval", "val", "test"], ["trainval"], ["test"]),
            (["train", "trainval", "val"], ["train"], ["val"]),
            (["a_train", "b_train", "a_test"], ["a_train"], ["a_test"]),
        ],
    )
    def test_beside_each_other(self, names, training, heldout):
        split = split_of(names)
        assert (split.training, split.heldout) == (training, heldout)
        assert split.unused == sorted({*names} - {*training, *heldout})

    def test_classes(self):
        assert split_of(["training_shoes", "test_tube"]) is None
        assert split_of(["train", "plane", "bus"], alone=lambda: False) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("cat/{}.png 3 - -\ndog/{}.png 3 - -\nTest/{}.png 3 - -", "not clear what to train on .* got Test, cat, dog"),
        ("set/cat/{}.png 3 - -\nset/val2017/{}.png 3 - -", "not clear what to train on .* got cat, val2017"),
        ("{}.png 3 - -\ntrain/{}.png 3 - -", "not clear what to train on .* got 0.png, 1.png, 2.png, train"),
        (
            "fold1/train/{}.png 3 - -\nfold1/test/{}.png 3 - -\nfold2/train/{}.png 3 - -\nfold2/test/{}.png 3 - -",
            "folds",
        ),
        (
            "train_fold1/{}.png 3 - -\ntest_fold1/{}.png 3 - -\ntrain_fold2/{}.png 3 - -\ntest_fold2/{}.png 3 - -",
            "folds",
        ),
    ],
)
def test_what_is_not_clear_is_refused(files, message, images, tmp_path):
    build(Layout(files), tmp_path / "set", images)
    with pytest.raises(ValueError, match=message):
        load_data(config(tmp_path / "set"))


def run_of(folder: Path, settings: Settings | None = None) -> None:
    """The settings of a run, a picture and a checkpoint."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "checkpoints" / "images-30").mkdir(parents=True)
    (settings or tiny(folder)).save(folder / "config.yaml")
    Pillow.new("RGB", (64, 64), 90).save(folder / "pictures" / "reconstructions.png")
    (folder / "metrics.jsonl").write_text("{}")


class TestOutputs:
    """What this package wrote is never an image of the set."""

    SET = "train/cat/{}.png 4 training cat\ntrain/dog/{}.png 4 training dog\nval/cat/{}.png 2 held-out cat"
    FLAT = "{}.png 6 cut -"

    @pytest.mark.parametrize(
        ("files", "settings"),
        [
            (SET, None),
            (FLAT, TextToImageConfig(data=DataConfig())),
            ("train/{}.png 6 cut -", None),
            ("a/b/{}.png 4 cut b\na/c/{}.png 4 cut c", None),
        ],
        ids=["parts", "flat", "train alone", "classes"],
    )
    def test_runs(self, files, settings, images, tmp_path, caplog):
        root = tmp_path / "photos"
        known = build(Layout(files), root, images)
        before = [part.fingerprint() for part in load_data(config(root), memory_limit=0)]
        for folder in ("runs/a", "train/runs/b", "c"):
            run_of(root / folder, settings)
        check(config(root), known, split="held-out" in files)
        assert [part.fingerprint() for part in load_data(config(root), memory_limit=0)] == before
        (note,) = {record.getMessage() for record in caplog.records if "left out" in record.getMessage()}
        assert "left out, because diffusers_vae wrote it" in note

    def test_run_in_the_root_itself(self, images, tmp_path):
        root = tmp_path / "photos"
        known = build(Layout(self.FLAT), root, images)
        run_of(root)
        check(config(root), known, split=False)

    @pytest.mark.parametrize(
        "marks",
        [
            ["evaluation.json", "report.html"],
            ["comparison.json", "comparison.png"],
            ["index.json", "shard-00000.safetensors"],
        ],
    )
    def test_evaluations_comparisons_and_latents(self, marks, images, tmp_path):
        root = tmp_path / "photos"
        known = build(Layout(self.FLAT), root, images)
        for name in (*marks, "pictures/a.png"):
            (root / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            Pillow.new("RGB", (64, 64), 90).save(root / "out" / name, "PNG")
        check(config(root), known, split=False)

    def test_of_other_programs_are_images(self, images, tmp_path):
        root = tmp_path / "photos"
        known = build(Layout(self.FLAT + "\nlogs/pictures/{}.png 2 cut -\ncontact-sheet.png 1 cut -"), root, images)
        (root / "logs" / "config.yaml").write_text("model: a\ndata: b\n")
        check(config(root), known, split=False)

    def test_run_in_an_archive(self, images, tmp_path):
        root = tmp_path / "photos"
        known = build(Layout("set/{}.png 6 cut -", then=lambda at: run_of(at / "set" / "runs" / "a")), root, images)
        packed("set.zip")(root)
        check(config(root / "set.zip"), known, split=False)

    @pytest.mark.slow
    def test_interrupted_run_in_the_folder_continues(self, images, tmp_path, monkeypatch, capsys):
        root = tmp_path / "photos"
        known = build(Layout(self.FLAT), root, images)
        monkeypatch.chdir(root)
        settings = tiny(Path("runs/a"), max_images=60, batch_size=5, checkpoint_every=30)
        settings = dataclasses.replace(settings, data=dataclasses.replace(config(Path(".")), resolution=8))
        fit(settings)
        Pillow.new("RGB", (64, 64), 90).save(root / "runs" / "a" / "pictures" / "reconstructions.png")
        shutil.rmtree(root / "runs" / "a" / "checkpoints" / max(os.listdir(root / "runs" / "a" / "checkpoints")))
        fit(settings)
        check(config(root), known, split=False)
        assert cli.main(["data", ".", "--data.channels", "3"]) == 0
        assert cli.main(["data", ".", "--data.channels", "3"]) == 0
        shown = capsys.readouterr().out
        assert (
            "5 training, 1 held-out" in shown and "left out, because diffusers_vae wrote it: contact-sheet.png" in shown
        )
        check(config(root), known, split=False)


@pytest.mark.slow
def test_commands_print_captions_and_what_is_not_used(images, tmp_path, capsys):
    root = tmp_path / "photos"
    layout = Layout(
        "train/{}.png 6 training -\nval/{}.png 2 held-out -\ntest/{}.png 2 unused -", then=beside(".caption")
    )
    build(layout, root, images)
    VAE(block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False).save_pretrained(tmp_path / "vae")
    assert cli.main(["data", str(root), "--data.channels", "3", "--out", str(tmp_path / "sheet.png")]) == 0
    shown = capsys.readouterr().out
    assert "captions      8 images\n" in shown and "note          unused, because other parts are used: test/" in shown
    arguments = [str(root), "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "latents")]
    assert cli.main(["encode", *arguments]) == 0
    assert "captions    6 images\n" in capsys.readouterr().out
