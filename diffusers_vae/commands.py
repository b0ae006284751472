"""What each command of `diffusers-vae` does."""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKLFlux2
from diffusers.models.modeling_utils import ModelMixin
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from .config import TRAININGS, Training, data_flags, new_parser, parse_settings, refuse_null, with_data
from .data import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    IN_MEMORY,
    OF_ROWS,
    OF_TRAINING,
    OWN_PICTURES,
    PLACED,
    DataConfig,
    Files,
    FileStore,
    ImageSet,
    is_hub_id,
    left_out,
    load_split,
    look,
    no_image,
    recommended,
    refuse_colours,
)
from .engine.loop import RunResult, Task, dry_run, run_task
from .evaluation.compare import compare
from .evaluation.evaluate import EvaluationConfig, evaluate, reconstruct
from .evaluation.float16 import measure_precision
from .evaluation.metrics import psnr
from .evaluation.report import EvaluationReport, read_report
from .fields import unread
from .hub.config import HubConfig
from .hub.push import check_can_push, push
from .images.files import read_image
from .images.grid import to_pil
from .images.ranges import ValueRange, to_model_range
from .images.raw_files import WRITTEN, FileKind, read_values, write_values
from .latents.encode import encode_images
from .latents.shards import DTYPES, Kind
from .losses.objective import ObjectiveConfig, VAEObjective
from .messages import message, problem_list, quoted, showable
from .models import (
    VAE,
    LatentScaling,
    encode,
    find_subfolder,
    is_local,
    load_autoencoder,
    no_such_path,
    read_config,
    unmeasured,
    weights_hash,
)
from .models.value_range import find_value_range
from .pipelines import latent_scaling
from .processes import Interrupted, lossy_output, on_main, one_first, process_share
from .reports.html import draw_report, report_html
from .reports.pages import contact_sheet, save_signed
from .reports.pictures import comparison_picture, sample_picture
from .reports.tables import comparison_table, look_table, precision_table, report_table
from .settings import config_of_run, read_settings
from .silence import GROUP_TIMEOUT, PATIENCE, Patience, report_progress, watched
from .storage import whole_file, whole_files, write_file, write_text
from .tasks.autoencoder import TrainResult
from .untrusted import check_type, read_json

logger = logging.getLogger(__name__)

RESUME_ME = 75  # EX_TEMPFAIL in sysexits.h: "the user is invited to try again later"


@lossy_output()
def run_train(arguments: Sequence[str]) -> int:
    """One training run of an autoencoder, as `training/train_vae.py` starts it."""
    return _run_training(TRAININGS["train"], arguments)


@lossy_output()
def run_train_text_to_image(arguments: Sequence[str]) -> int:
    """One training run of a text-to-image model, as `training/train_text_to_image.py` starts it."""
    written_out = {"--vae": "--vae.source", "--latents": "--latents.folder"}
    names = [argument.partition("=") for argument in arguments]
    return _run_training(
        TRAININGS["train-text-to-image"],
        [f"{written_out.get(name, name)}{equals}{value}" for name, equals, value in names],
    )


def _run_training(training: Training, arguments: Sequence[str]) -> int:
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    config, dry = parse_settings(training, arguments)
    first = os.environ.get("RANK", "0") == "0"
    hub = getattr(config, "hub", HubConfig())
    if hub.push and first:
        check_can_push(hub)  # before days of training, not after
    try:
        if dry:
            _describe_dry_run(training.task(config))
        elif result := run_task(training.task(config)):  # on the main process
            _describe(result)
            if hub.push:
                print(showable(f"published   {push(result.output_dir, hub)}"))
    except Interrupted as interruption:
        if first:
            print(message(interruption), file=sys.stderr)
        _leave_group()
        return RESUME_ME
    _leave_group()
    return 0


@contextmanager
def _launched(doing: str, patience: Patience, again: str) -> Iterator[PartialState]:
    """Watch the processes that `accelerate launch` started while they work. An error names what was `doing`, and
    ends with the sentence `again`, which says what the same command does. A single process is not watched.
    """
    with watched(patience, again):
        report_progress(doing)
        yield PartialState(cpu=not torch.accelerator.is_available(), timeout=GROUP_TIMEOUT)
    _leave_group()


def _leave_group() -> None:
    """Without it, a process that ends before the others may abort, since the group's threads still run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _describe_dry_run(task: Task) -> None:
    outcome = dry_run(task)
    if outcome is None:
        return
    result, same, seconds = outcome
    _describe_size(result, ", evaluation included")
    print(f"resumed from a checkpoint: {'bit-identical' if same else 'NOT bit-identical, see run.deterministic'}")
    if seconds is not None:
        print(f"the training steps would take about {seconds / 60:,.1f} min ({result.images_per_second:,.0f} images/s)")
    print("dry run: every phase ran, nothing was kept")


def _describe_size(result: RunResult, phases: str = "") -> None:
    memory = "" if result.memory is None else f", at most {result.memory / 2**20:,.0f} MiB of memory{phases}"
    print(f"\n{result.parameters:,} parameters, latents {'x'.join(map(str, result.latent_shape))}{memory}")


def _describe(result: RunResult) -> None:
    _describe_size(result)
    if isinstance(result, TrainResult):
        print(report_table(asdict(replace(result.report, per_image=None))))
        print(showable(f"report      {result.output_dir / 'report.html'}"))
    else:
        print(f"held-out squared error of the prediction {result.heldout_error:.4f}")
    print(showable(f"pictures    {result.output_dir / 'pictures'}"))
    print(showable(f"evaluation  {result.output_dir / 'evaluation.json'}"))
    print(showable(f"{result.saved:<12}{result.output_dir / result.saved}"))
    print(showable(f"load it     {result.load_line}"))


def run_data(arguments: Sequence[str]) -> int:
    """What is in a data set."""
    parser = _parser(
        "data",
        "DATA [--out FILE] [--data.KEY VALUE ...]",
        "Look at a data set before a training: how many images there are, of which sizes and kinds, which files cannot "
        "be read, are the same, or show hardly anything; the statistics of their channels; a contact sheet of them as "
        "a training sees them; and the command that we would begin with.",
        "diffusers-vae data photos/ --data.channels 3 --data.resolution 64",
    )
    parser.add_argument("images", metavar="DATA", help=IMAGES)
    parser.add_argument("--out", type=str, default="contact-sheet.png", help="The picture.")
    parser.add_argument(
        "--max_images", type=PositiveInt, default=2000, help="So many training images, at most, are decoded."
    )
    parser.add_class_arguments(DataConfig, "data", skip={"crops", "on_bad_image", "num_workers", *NOT_MEASURED})
    parsed, _ = _parse_data(parser, arguments)
    path = _picture(parsed)
    root = Path(parsed.data.root).resolve()
    known = path.name in OWN_PICTURES  # which are left out of a set
    if parsed.data.name in PLACED and path.resolve().is_relative_to(root) and not known:
        raise ValueError(f"--out would be an image of the set; give it another place than {root}")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = look(parsed.data, parsed.max_images, True)
    print(look_table(found))
    with whole_file(path) as partial:
        save_signed(contact_sheet(to_model_range(found.shown), parsed.data.described), partial)
    preset, settings = recommended(found, replace(parsed.data, channels=len(found.mean)))
    flags = [f"--{name} {shlex.quote(value)}" for name, value in settings.items()]
    print(showable(f"picture       {path}"))
    print(f"begin with    training/configs/{preset}.yaml:\n")
    print(
        showable(f"accelerate launch training/train_vae.py --config training/configs/{preset}.yaml {' '.join(flags)}")
    )
    return 0


def run_evaluate(arguments: Sequence[str], patience: Patience = PATIENCE) -> int:
    """Measure one model. Processes that fall silent are waited for with `patience`."""
    parser = _parser(
        "evaluate",
        "MODEL [--data NAME|FOLDER] [--SECTION.KEY VALUE ...]",
        "Measure an autoencoder: figures in the terminal, and evaluation.json, evaluation.csv, report.html and "
        "pictures/ in a folder. Settings that are not given are those of the model's run; without one, channels and "
        "resolution are the model's. With `accelerate launch -m diffusers_vae.cli evaluate ...`, on several processes.",
        "diffusers-vae evaluate stabilityai/sd-vae-ft-mse --data photos/ --data.resolution 256 --evaluation.rfid true",
    )
    parser.add_argument("model", help=MODEL)
    _add_measuring(parser)
    with _launched("the evaluation", patience, "The same command measures again") as state:
        _evaluate(parser, arguments, state)
    return 0


def _evaluate(parser: ArgumentParser, arguments: Sequence[str], state: PartialState) -> None:
    parsed, (model,) = _parse_measuring(parser, arguments, ["model"])
    with one_first(state.is_local_main_process, "reading the data set"):
        images, split = _load_images(parsed, [parsed.model], state.is_local_main_process)
    if state.is_main_process:
        print(showable(f"data        {images.files}"), flush=True)
    name = _name(parsed.model)
    out = Path(parsed.out or Path("evaluations") / name.replace("/", "--"))
    # what cannot be written must not cost the measuring
    on_main(lambda: (out / "pictures").mkdir(parents=True, exist_ok=True))
    report = evaluate(
        model, images, _objective(parsed, parsed.model), parsed.evaluation, parsed.data, split, name, True
    )
    on_main(lambda: _write_evaluation(out, report, model, images, parsed.evaluation))


def _write_evaluation(
    out: Path, report: EvaluationReport, model: ModelMixin, images: ImageSet, config: EvaluationConfig
) -> None:
    text = report.to_json()
    print(report_table(json.loads(text)))
    with whole_files(out) as partial:
        write_text(partial / "evaluation.json", text)
        write_text(partial / "evaluation.csv", report.per_image.to_csv())
        pictures = draw_report(model, images, None, config, report)
        (partial / "pictures").mkdir()
        for name, picture in pictures.items():
            picture.save(partial / "pictures" / f"{name}.png")
        write_text(partial / "report.html", report_html(json.loads(text), pictures, report.model.name))
    print(showable(f"report      {out / 'report.html'}"))
    print(showable(f"evaluation  {out / 'evaluation.json'}"))


def run_compare(arguments: Sequence[str]) -> int:
    """Measure two models in pairs."""
    parser = _parser(
        "compare",
        "FIRST SECOND [--data NAME|FOLDER] [--SECTION.KEY VALUE ...]",
        "Measure two autoencoders under one protocol, image by image: differences with intervals in the terminal, and "
        "comparison.json and comparison.png in a folder. Differences are SECOND minus FIRST. Settings that are not "
        "given are those of the models' runs; those in which two runs differ must be given.",
        "diffusers-vae compare stabilityai/sd-vae-ft-mse runs/mine --data photos/ --data.resolution 256",
    )
    parser.add_argument("first", help=MODEL)
    parser.add_argument("second", help=MODEL)
    _add_measuring(parser)
    parsed, models = _parse_measuring(parser, arguments, ["first", "second"])
    images, split = _load_images(parsed, [parsed.first, parsed.second], True)
    print(showable(f"data        {images.files}"), flush=True)
    names = [_name(parsed.first), _name(parsed.second)]
    if names[0] == names[1]:  # two folders of one name
        names = [parsed.first, parsed.second]
    out = Path(parsed.out or Path("comparisons") / "--vs--".join(name.strip("./").replace("/", "--") for name in names))
    out.mkdir(parents=True, exist_ok=True)
    _check_images(models, names, images)
    objective = _objective(parsed, parsed.first, parsed.second)
    reports = [
        evaluate(model, images, objective, parsed.evaluation, parsed.data, split, name, True)
        for model, name in zip(models, names, strict=True)
    ]
    comparison = compare(*reports)
    text = comparison.to_json()
    print(comparison_table(json.loads(text)))
    shown = [reports[0].per_image.indices[place] for place in comparison.most_different]
    originals = to_model_range(images.__getitems__(shown).checked().pixels.to(models[0].device))
    with torch.no_grad():
        first, second = (reconstruct(model, originals, shown, parsed.evaluation) for model in models)
    captions = [
        ", ".join(f"{report.per_image.figures['psnr'][place]:.2f}" for report in reports) + " dB"
        for place in comparison.most_different
    ]
    picture = comparison_picture(originals.cpu(), first.cpu(), second.cpu(), names, captions)
    with whole_files(out) as partial:
        write_text(partial / "comparison.json", text)
        picture.save(partial / "comparison.png")
    print(showable(f"comparison  {out / 'comparison.json'}"))
    print(showable(f"picture     {out / 'comparison.png'}"))
    return 0


@torch.no_grad()
def _check_images(models: Sequence[ModelMixin], names: Sequence[str], images: ImageSet) -> None:
    """Refuse what a model cannot take before the others are measured."""
    pixels = images.__getitems__([0]).pixels
    for model, name in zip(models, names, strict=True):
        try:
            if len(pixels):
                encode(model, to_model_range(pixels.to(model.device)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def run_fp16(arguments: Sequence[str]) -> int:
    """Whether a model can run in float16."""
    parser = _parser(
        "fp16",
        "MODEL [--data NAME|FOLDER] [--write true]",
        "Say whether an autoencoder can run in float16: the largest activation of each block on real images, a run in "
        "float16 itself, and whether force_upcast, by which pipelines in float16 run it in float32, can be false. Data "
        "that are not given are those of the model's run; without one, channels and resolution are the model's.",
        "diffusers-vae fp16 runs/mine --write true",
    )
    parser.add_argument("model", help=MODEL)
    _add_source(parser)
    _add_device(parser)
    _add_images(parser)
    parser.add_argument("--max_images", type=PositiveInt, default=256, help="At most this many are measured.")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="Images per forward.")
    parser.add_argument(
        "--write",
        type=bool,
        default=False,
        help="Set force_upcast to false in the model's config.json, if that is safe.",
    )
    parsed, (model,) = _parse_measuring(parser, arguments, ["model"])
    file = _config_file(parsed.model, parsed.subfolder)
    if parsed.write and "force_upcast" not in model.config:
        raise ValueError(f"--write sets force_upcast, which {type(model).__name__} does not have")
    if parsed.write and file is None:
        kind = "a single file, without one" if Path(parsed.model).is_file() else "a repository"
        raise ValueError(f"--write changes a config.json on this machine, and {parsed.model} is {kind}")
    images, _ = _load_images(parsed, [parsed.model], True)
    report = measure_precision(model, images, parsed.batch_size, parsed.max_images, True)
    print(precision_table(asdict(report)))
    if not parsed.write:
        return 0
    if not report.safe:
        raise ValueError(f"{file} is left as it is. {report.advice}")
    config = read_json(file)
    if config.get("force_upcast") is False:
        print(showable(f"force_upcast was false already in {file}"))
        return 0
    write_file(file, json.dumps(config | {"force_upcast": False}, indent=2) + "\n")
    print(showable(f"force_upcast is now false in {file}"))
    return 0


def _config_file(source: str, subfolder: str | None) -> Path | None:
    """The config.json of the model in the folder `source`, where `load_autoencoder` looks, if it is one."""
    file = Path(source, find_subfolder(source, subfolder) or "", "config.json")
    return file if file.is_file() else None


def run_reconstruct(arguments: Sequence[str]) -> int:
    """Image files through the model."""
    parser = _parser(
        "reconstruct",
        "MODEL IMAGE [IMAGE ...] [--out FOLDER]",
        "Encode and decode image files at their own size, and write what comes back as PNG files. A model that was "
        "trained with data.value_range, or with other channels than 1 and 3, reads files as they are and writes the "
        "kind, depth and range that came in. Sides that the model cannot take are padded with the border's pixels, and "
        "cut again. Files that cannot be read are named, and the others done.",
        "diffusers-vae reconstruct runs/mine photo.jpg more-photos/ --out reconstructions",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("images", nargs="+", help="Image files, or folders and archives of them.")
    _add_loading(parser)
    parser.add_argument("--out", type=str, default="reconstructions", help="Folder for the files.")
    parser.add_argument("--seed", type=int | None, default=None, help="Decode a draw of this seed, not the mode.")
    parsed = _parse(parser, arguments)
    model = _load(parsed, parsed.model)
    files, out, failed, written = _image_files(parsed.images), Path(parsed.out), [], set()
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() in (file.resolve().parent for file, _ in files):
        raise ValueError(f"--out must be another folder than that of the images, got {out.resolve()}")
    channels = model.config.in_channels
    stated = find_value_range(parsed.model, parsed.subfolder, parsed.revision)
    config = EvaluationConfig(
        reconstruction="mode" if parsed.seed is None else "sample", seed=parsed.seed or 0, round_to_8_bit=stated is None
    )
    for index, (file, content) in enumerate(tqdm(files, unit="img", disable=len(files) == 1)):
        try:
            kind = None
            if stated or channels not in (1, 3) or file.suffix.lower() == ".npy":
                pixels, kind = _as_it_is(file, channels, stated, content)
            else:
                pixels = read_image(file, channels, content=content)
            images = to_model_range(pixels[None].to(model.device))
            with torch.no_grad():
                reconstruction = _at_any_size(model, images, index, config)
            values = kind and (stated or EIGHT_BITS).from_model_range(reconstruction[0], kind.dtype)
        except ValueError as error:
            failed.append(str(error))
            continue
        path = out / (file.name if kind and kind.format in WRITTEN else f"{file.stem}.png")
        if path in written:  # of two folders
            path = out / f"{file.stem}-{index}{path.suffix}"
        written.add(path)
        with whole_file(path) as partial:
            if kind:
                write_values(partial, values, kind)
            else:
                save_signed(to_pil(reconstruction, 1).convert("L" if channels == 1 else "RGB"), partial)
        over = f" over {stated}" if stated else ""
        tqdm.write(f"{showable(path)}  PSNR {psnr(images, reconstruction).item():.2f} dB{over}")
    if failed:
        listed = "\n".join(map(showable, failed))
        raise ValueError(f"{len(failed)} of {len(files)} images could not be reconstructed:\n{listed}")
    return 0


EIGHT_BITS = ValueRange(0, 255)


Content = Callable[[], BinaryIO] | None
"""Opens an image file in an archive."""


def _as_it_is(file: Path, channels: int, stated: ValueRange | None, content: Content) -> tuple[torch.Tensor, FileKind]:
    """Pixels (C, H, W) in [0, 1] of a file, and its kind; ValueError naming it when its values are not in the range."""
    values, kind = read_values(file, channels, content)
    try:
        if not stated and values.dtype != np.uint8:
            raise ValueError(f"values must have 8 bits, as those that the model was trained on, got {values.dtype}")
        return (stated or EIGHT_BITS).to_unit(values), kind
    except ValueError as error:
        raise ValueError(f"cannot read the image {file}: {error}") from error


def _image_files(names: Sequence[str]) -> list[tuple[Path, Content]]:
    """The image files that are named, and those below the folders and in the archives that are, as sets list them."""
    listed: list[tuple[Path, Content]] = []
    for name in names:
        path = Path(name)
        if path.is_dir() or path.suffix.lower() in ARCHIVES:
            files = Files(path)
            below = files.below(path)
            images = [file for file in below if file.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise FileNotFoundError(no_image(files, [path], below))
            if ignored := left_out(files, below):
                logger.warning("%d files look like images and are left out:\n%s", len(ignored), problem_list(ignored))
            store = FileStore(path, images, files.members)
            listed += [(file, store.opener(row, True)) for row, file in enumerate(images)]
        elif path.exists():
            listed.append((path, None))
        else:
            raise FileNotFoundError(f"there is no image {path.resolve()}")
    return listed


def _at_any_size(model: ModelMixin, images: torch.Tensor, index: int, config: EvaluationConfig) -> torch.Tensor:
    height, width = images.shape[-2:]
    ratio = _compression(model)
    padding = (0, -width % ratio, 0, -height % ratio)
    padded = torch.nn.functional.pad(images, padding, mode="replicate")
    return reconstruct(model, padded, [index], config)[..., :height, :width]


def _compression(model: ModelMixin) -> int:
    """By what the sides of images must be divisible."""
    names = ("block_out_channels", "down_block_out_channels", "ch_mult")
    widths = next((model.config[name] for name in names if name in model.config), (1,))
    return 2 ** (len(widths) - 1)


def run_sample(arguments: Sequence[str]) -> int:
    """Draws from the prior."""
    parser = _parser(
        "sample",
        "MODEL [--count N] [--out FILE]",
        "Decode draws from the prior N(0, I) into one picture. Models with spatial latents need a diffusion model for "
        "whole images.",
        "diffusers-vae sample runs/mnist-mlp-z20 --count 64 --out samples.png",
    )
    parser.add_argument("model", help=MODEL)
    _add_loading(parser)
    parser.add_argument("--count", type=PositiveInt, default=64, help="How many.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws.")
    parser.add_argument("--out", type=str, default="samples.png", help="The picture.")
    parsed = _parse(parser, arguments)
    path = _picture(parsed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = _load(parsed, parsed.model)
    with whole_file(path) as partial:
        save_signed(sample_picture(model, _latent_shape(model), 16, parsed.seed, parsed.count), partial)
    print(showable(f"picture     {path}"))
    return 0


def run_encode(arguments: Sequence[str], patience: Patience = PATIENCE) -> int:
    """The latents of a data set. Processes that fall silent are waited for with `patience`."""
    parser = _parser(
        "encode",
        "DATA --vae MODEL --out FOLDER [--SECTION.KEY VALUE ...]",
        "Write the latents of a data set, with labels and captions, to a folder, once, for a training that needs no "
        "autoencoder beside it. The same command continues one that was interrupted. Settings of the data that are not "
        "given are those of the model's run; without one, channels and resolution are the model's. With `accelerate "
        "launch -m diffusers_vae.cli encode ...`, on several processes.",
        "diffusers-vae encode photos/ --vae runs/mine --out latents/photos --dtype float16",
    )
    parser.add_argument("images", metavar="DATA", help=IMAGES)
    parser.add_argument("--vae", required=True, help=MODEL)
    _add_source(parser)
    _add_device(parser)
    parser.add_argument("--out", type=str, required=True, help="Folder for the latents.")
    parser.add_argument(
        "--kind",
        type=Kind,
        default="posterior",
        help="posterior: mean and logvar, from which each epoch can draw anew. sample: one draw. mode: the mean.",
    )
    parser.add_argument(
        "--dtype", type=Literal[tuple(DTYPES)], default="float32", help="Of the stored values; the weights are float32."
    )
    parser.add_argument(
        "--compute_dtype",
        type=Literal[tuple(DTYPES)] | None,
        default=None,
        help="In which the encoder runs, as the result says. By default as FOLDER was begun, if it was; else bfloat16 "
        "where the device multiplies it in hardware, and float32 elsewhere. How far apart they are: docs/pipeline.md.",
    )
    parser.add_argument(
        "--split",
        type=Literal["held-out", "training", "all"] | None,
        default=None,
        help="Which images; by default the training ones, but all of a folder that has no parts.",
    )
    parser.add_argument(
        "--captions",
        type=bool,
        default=True,
        help="Read the captions of the images: metadata.jsonl, metadata.csv, NAME.txt, NAME.caption or NAME.json.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the draws of --kind sample.")
    parser.add_argument(
        "--batch_size",
        type=PositiveInt | None,
        default=None,
        help="Images per forward on one process; by default as many as keep a CPU's caches or a GPU busy.",
    )
    parser.add_argument("--shard_images", type=PositiveInt, default=4096, help="Images per file.")
    parser.add_class_arguments(DataConfig, "data", skip=NOT_MEASURED)
    with _launched("encoding", patience, "The same command continues after the last whole shards") as state:
        _encode(parser, arguments, state)
    return 0


def _encode(parser: ArgumentParser, arguments: Sequence[str], state: PartialState) -> None:
    parsed, place = _parse_data(parser, arguments)  # wrong ones are told before a model is loaded
    if "--data.root" in place and "datasets" not in place and not Path(parsed.images).exists():
        raise FileNotFoundError(
            f"DATA must be {', '.join(IN_MEMORY)}, a folder or archive of images, an array of them, Parquet, or "
            f"NAMESPACE/NAME on the Hub, got {parsed.images}"
        )
    vae = load_autoencoder(parsed.vae, parsed.subfolder, parsed.revision).to(_device(parsed))
    known = _settings_of_run(parsed.vae).get("data") or _data_for(vae, parsed, parsed.vae)
    known = _of_another_set(known, parsed.data, place)
    if known.get("name") in PLACED:  # whose root is no place for other sets
        known.pop("root", None)
    parsed = _parse(parser, [f"--data={json.dumps(known)}", *arguments, *place], config_of_run(parsed.vae))
    with one_first(state.is_local_main_process, "reading the data set"):
        images, split = _load_images(
            parsed, [parsed.vae], state.is_local_main_process, parsed.captions, default="training"
        )
    if state.is_main_process:
        print(showable(f"data        {images.files}"), flush=True)
    data, unreadable = parsed.data, len(images.errors)  # found so far; those of a set read on demand are rows less
    latents = encode_images(
        vae,
        images,
        parsed.out,
        kind=parsed.kind,
        dtype=DTYPES[parsed.dtype],
        compute_dtype=parsed.compute_dtype and DTYPES[parsed.compute_dtype],
        batch_size=parsed.batch_size,
        seed=parsed.seed,
        shard_images=parsed.shard_images,
        data=f"{data.described}, {split}; {data.channels}x{'x'.join(map(str, data.size))}, others {data.resize}",
        progress=True,
    )
    if state.is_main_process:
        count, crops = len(latents), data.crops if isinstance(data.crops, int) else 1
        if crops > 1 and not count % crops:
            encoded = f"{crops:,} crops of each of {count // crops:,} images"
        else:
            encoded = f"{count:,}"
        print(showable(f"images      {encoded} of {data.described}, {split}"))
        if unreadable := unreadable + len(images) - len(latents):
            print(f"left out    {unreadable:,} that cannot be read")
        if parsed.captions:
            print(f"captions    {'none' if images.captions is None else f'{len(latents):,} images'}")
        print(f"latents     {'x'.join(map(str, latents.latent_shape))}, {parsed.kind}, {parsed.dtype}")
        print(f"computed    in {str(latents.compute_dtype).removeprefix('torch.')} on {vae.device.type}")
        print(f"size        {latents.bytes / 2**20:,.1f} MiB")
        print(showable(f"folder      {parsed.out}"))
        place = quoted(Path(parsed.out).absolute())
        print(f"open it     from diffusers_vae import LatentDataset; latents = LatentDataset({place})")


def _size(model: ModelMixin) -> tuple[int, int]:
    """Height and width of images that the model was made for."""
    size = model.config.get("image_size") or model.config.get("sample_size") or 32
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def _latent_shape(model: ModelMixin) -> tuple[int, ...]:
    nothing = copy.deepcopy(model).to("meta")  # shapes alone: an image of full size may take long
    blank = torch.zeros(1, model.config.in_channels, *_size(model), device="meta")
    return tuple(encode(nothing, blank).mean.shape[1:])


def run_push(arguments: Sequence[str]) -> int:
    """Publish a run."""
    parser = _parser(
        "push",
        "RUN REPO_ID [--private true] [--license ID] ...",
        "Publish a finished run as a model repository on the Hugging Face Hub, in one commit: the model, its card, "
        "pictures/, evaluation.json and config.yaml. Log in first, with `hf auth login` or HF_TOKEN. After an error, "
        "the same command goes on. Settings that are not given are those of the run's hub section.",
        "diffusers-vae push runs/mnist-vae me/mnist-vae --license apache-2.0",
    )
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    parser.add_argument("target", metavar="REPO_ID", type=str, help="NAMESPACE/NAME of the repository.")
    parser.add_class_arguments(HubConfig, skip={"push", "repo_id"}, as_group=False)
    parsed = _parse(parser, arguments)
    if (file := Path(parsed.run) / "config.yaml").is_file():  # licence and the rest, as the run was told
        known = [
            f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in read_settings(file).get("hub", {}).items()
            if name not in ("push", "repo_id") and value is not None
        ]
        parsed = _parse(parser, [*known, *arguments])
    settings = parsed.as_dict()
    run, repo_id = Path(settings.pop("run")), settings.pop("target")
    try:
        config = HubConfig(push=True, repo_id=repo_id, **settings)
    except ValueError as error:
        parser.exit(2, message(f"error: {error}") + "\n")
    print(showable(f"published   {push(run, config)}"))
    return 0


def run_info(arguments: Sequence[str]) -> int:
    """What a model is."""
    parser = _parser(
        "info",
        "MODEL",
        "Say what a model is, how to load it and, of a run, what was measured.",
        "diffusers-vae info runs/digits",
    )
    parser.add_argument("model", help=MODEL)
    _add_source(parser)
    parsed = _parse(parser, arguments)
    model = load_autoencoder(parsed.model, parsed.subfolder, parsed.revision)
    config, shape = model.config, _latent_shape(model)
    height, width = _size(model)
    name = "AutoencoderKL" if isinstance(model, VAE) else type(model).__name__
    facts = {
        "class": name,
        "load it": _load_line(name, parsed.model, parsed.subfolder, parsed.revision),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": f"{config.in_channels}x{height}x{width}" + ("" if "image_size" in config else " or other sizes"),
        "latents": f"{'x'.join(map(str, shape))}, {height // shape[1]} times smaller a side",
        **_scaled_latents(model),
        "weights": f"SHA-256 {weights_hash(model)}",
    }
    if stated := find_value_range(parsed.model, parsed.subfolder, parsed.revision):
        facts["values"] = f"of files in {stated}, whose ends are -1 and 1"
    print("\n".join(showable(f"{name:<16}{value}") for name, value in facts.items()))
    evaluation = Path(parsed.model) / "evaluation.json"
    if evaluation.exists():
        print(report_table(json.loads(read_report(evaluation).to_json())))
    return 0


def _load_line(name: str, source: str, subfolder: str | None, revision: str | None) -> str:
    """Code that loads the model of the class `name`, whatever the working directory."""
    path = Path(source)
    if path.is_file():
        return (
            f"from diffusers_vae.models import load_autoencoder; vae = load_autoencoder({quoted(str(path.absolute()))})"
        )
    inside = find_subfolder(source, subfolder)
    place, further = source, {"subfolder": inside, "revision": revision}
    if path.exists():
        place, further = str(path.absolute() / (inside or "")), {}
    options = "".join(f", {key}={quoted(value)}" for key, value in further.items() if value)
    package = "diffusers_vae" if name == "MLPVAE" else "diffusers"
    return f"from {package} import {name}; vae = {name}.from_pretrained({quoted(place)}{options})"


def _scaled_latents(model: ModelMixin) -> dict[str, str]:
    """How latents become scaled latents, as a formula, and where stock pipelines differ, theirs."""
    config = model.config
    if isinstance(model, AutoencoderKLFlux2):
        formula = f"(patches - vae.bn.running_mean) / sqrt(vae.bn.running_var + {config.batch_norm_eps:g})"
        return {"scaled latents": f"{formula}, by channel of the patches: each 2x2 square of latents is one position"}
    if unmeasured(config):
        factor = config.get("scaling_factor")
        return {"scaled latents": f"unknown: scaling_factor {factor} was not measured or published for this model"}
    formula = _formula(LatentScaling.from_config(config))
    others: dict[str, list[str]] = {}
    for name, pipeline in PIPELINES.items():
        try:
            own = _formula(latent_scaling(pipeline, model))
        except (TypeError, ValueError):  # it cannot compute with this config
            continue
        if own != formula:
            others.setdefault(own, []).append(name)
    listed = "; ".join(f"{', '.join(names)}: {own}" for own, names in others.items())
    return {"scaled latents": formula} | ({"in pipelines of": listed} if listed else {})


PIPELINES = {
    "Stable Diffusion": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
    "Stable Diffusion 3": "StableDiffusion3Pipeline",
    "FLUX.1": "FluxPipeline",
    "DiT": "DiTPipeline",
}
"""One of each family, which all scale latents in the same way."""


def _formula(scaling: LatentScaling) -> str:
    if scaling.mean is None:
        shifted = f"(latents {-scaling.shift:+.6g})" if scaling.shift else "latents"
        return f"{shifted} * {scaling.factor:.6g}"
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (scaling.mean, scaling.std))
    return f"(latents - mean) * {scaling.factor:.6g} / std, by channel: mean {mean}; std {std}"


IMAGES = "A set, as in data.name, a folder or archive of images, an array (.npy, .npz), Parquet, or a set on the Hub."
MODEL = "Folder of a model, of a run or of a pipeline, or a repository on the Hub."


def _parser(command: str, usage: str, description: str, example: str) -> ArgumentParser:
    return new_parser(usage, description, example, f"diffusers-vae {command}")


def _parse(parser: ArgumentParser, arguments: Sequence[str], file: Path | None = None) -> Namespace:
    """The settings; a wrong one ends the process. `file` holds those that are not given as flags."""
    try:
        parsed = parser.parse_args(arguments)
        for section, kind in (("data", DataConfig), ("objective", ObjectiveConfig), ("evaluation", EvaluationConfig)):
            if section in parsed:
                refuse_null(parsed[section], section, kind)
        return parser.instantiate(parsed)
    except (ArgumentError, ValueError) as error:
        source = f"\nSettings that are not given as flags are those of {file}." if file else ""
        parser.exit(2, message(f"error: {error}{source}") + "\n")


def _parse_data(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The settings, and what DATA adds to them."""
    try:
        images = parser.parse_args([*ANY_DATA, *arguments]).images
    except (ArgumentError, ValueError) as error:
        parser.exit(2, message(f"error: {error}") + "\n")
    named = any(argument.partition("=")[0] == "--data.name" for argument in arguments)
    place = ["--data.root", images] if named else data_flags(images)
    return _parse(parser, [*arguments, *place]), place


def _picture(parsed: Namespace) -> Path:
    """Where --out says that a picture goes."""
    path = Path(parsed.out)
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix != ".npy"]
    if path.suffix.lower() not in pictures:
        raise ValueError(f"--out must be a picture, {', '.join(pictures)}, got {path}")
    return path


def _add_source(parser: ArgumentParser) -> None:
    parser.add_argument("--subfolder", type=str | None, default=None, help="Where in a repository the model lies.")
    parser.add_argument("--revision", type=str | None, default=None, help="Of a repository.")


def _add_loading(parser: ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="Of the weights."
    )
    _add_device(parser)


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str | None, default=None, help="By default a GPU, if there is one.")


def _device(parsed: Namespace) -> torch.device | str:
    device = parsed.device or PartialState(cpu=not torch.accelerator.is_available()).device
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device must be one that torch can use here, got {device}: {error}") from error
    return device


def _load(parsed: Namespace, source: str) -> ModelMixin:
    device = _device(parsed)
    dtype = getattr(torch, parsed.get("dtype", "float32"))
    return load_autoencoder(source, parsed.subfolder, parsed.revision, dtype).to(device)


NOT_MEASURED = set(OF_TRAINING) - {"streaming"}
"""Settings of the data that only a training reads."""
MEASURED = {"likelihood", "scale", "kl_weight"}
"""What an objective is measured with; the rest of it is for training."""
NEEDED = {
    "data": {"name": str, "root": str, "heldout_fraction": float},
    "objective": dict.fromkeys(sorted(MEASURED), object),
}
"""What the config.yaml of a run must hold to be measured on its images."""


def _add_measuring(parser: ArgumentParser) -> None:
    _add_loading(parser)
    parser.add_argument("--out", type=str | None, default=None, help="Folder for the results.")
    _add_images(parser)
    of_training = {field.name for field in fields(ObjectiveConfig)} - MEASURED
    parser.add_class_arguments(ObjectiveConfig, "objective", skip=of_training)
    parser.add_class_arguments(EvaluationConfig, "evaluation", skip={"every"})


def _add_images(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        type=Literal["held-out", "training", "all"] | None,
        default=None,
        help="Which images; by default the held-out ones, but all of a folder that has no part for them and that the "
        "model was not trained on.",
    )
    parser.add_class_arguments(DataConfig, "data", skip=NOT_MEASURED)


def _parse_measuring(
    parser: ArgumentParser, arguments: Sequence[str], models: list[str]
) -> tuple[Namespace, list[ModelMixin]]:
    """The settings and the models. Settings that are not given come from the models' runs or, if there are none, from
    the models' configs. The order of the models does not matter.
    """
    arguments = with_data(arguments)
    parsed = _parse(parser, [*ANY_DATA, *arguments])  # wrong ones are told before a model is loaded
    sources = [parsed[name] for name in models]
    for source in sources:
        if is_local(source):
            read_config(source, parsed.subfolder, parsed.revision)
    if not any(argument.startswith("--data.") for argument in arguments) and not any(map(config_of_run, sources)):
        first = sources[0]
        why = f"{first} belongs to no run that does" if is_local(first) else f"{no_such_path(first)} whose run does"
        parser.exit(2, message(f"error: name the images with --data: {why}") + "\n")
    loaded = [_load(parsed, source) for source in sources]
    runs = {source: run for source in sources if (run := _settings_of_run(source, arguments))}
    known = {source: run | {"data": _data_of_run(run, runs, parsed.data, arguments)} for source, run in runs.items()}
    if not known:
        known = {
            source: {"data": _data_for(model, parsed, source)} for source, model in zip(sources, loaded, strict=True)
        }
    found = {}
    for source, sections in known.items():
        flags = [f"--{name}={json.dumps(values)}" for name, values in sections.items() if name in parsed]
        found[source] = _parse(parser, [*flags, *arguments], config_of_run(source))
    _refuse_differences(found)
    chosen, parsed = next(iter(found.items()))
    if runs and not _names_images(arguments) and process_share()[0] == 0:  # somebody else may have chosen them
        place = parsed.data.root if parsed.data.name in PLACED else parsed.data.name
        place += f" in {parsed.data.root}" if parsed.data.name not in (*PLACED, "digits") else ""
        print(showable(f"images      {place}, as {config_of_run(chosen)} says"), flush=True)
    same = [run["data"] for run in runs.values() if _same_set(run["data"], vars(parsed.data))]
    if parsed.split is None and same:  # some model was trained on these images, but for the held-out ones
        if {data["heldout_fraction"] for data in same} != {parsed.data.heldout_fraction}:
            raise ValueError(
                "data.heldout_fraction must be that of the training, or a model is measured on what it was trained on; "
                "--split says which images to take all the same"
            )
        parsed.split = "held-out"
    return parsed, loaded


def _load_images(parsed: Namespace, sources: Sequence[str], *arguments: Any, **options: Any) -> tuple[ImageSet, str]:
    """The images for the models of `sources`, and which part they are, as `load_split` gives them, with further
    arguments of that; `parsed.data` then states their channels.
    """
    images, split = load_split(parsed.data, parsed.split, *arguments, **options)
    for source in sources:
        refuse_colours(images, parsed.data, source)
    parsed.data = replace(parsed.data, channels=images.channels)
    return images, split


def _data_of_run(run: dict[str, Any], runs: dict[str, Any], asked: DataConfig, flags: Sequence[str]) -> dict[str, Any]:
    """Settings of a run's data. If `flags` ask for another set, only those that the run's model needs, and the rest
    from the run that was trained on that set, if there is one.
    """
    if not _names_images(flags) or _same_set(run["data"], vars(asked)):
        return run["data"]
    owner = next((other["data"] for other in runs.values() if _same_set(other["data"], vars(asked))), {})
    if run["data"]["name"] in IN_MEMORY and asked.name in IN_MEMORY:  # which lie beside each other
        owner = {"root": run["data"]["root"]} | owner
    return _read_of(asked, owner | {name: value for name, value in run["data"].items() if name in OF_MODEL})


def _read_of(asked: DataConfig, known: dict[str, Any]) -> dict[str, Any]:
    """The settings in `known` that the set `asked` for reads, and value_range, without which the model would get other
    values than it was trained on.
    """
    ignored = unread(DataConfig, vars(asked) | known | {"name": asked.name}).keys() - {"value_range"}
    ignored |= {"root"} if asked.name == "digits" else set()
    ignored |= {"channels"} if known.get("channels") == 1 else set()  # images in colour are not made grey unasked
    return {name: value for name, value in known.items() if name not in ignored}


def _same_set(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two settings of data mean the same images, wherever those of a named set lie."""
    return one["name"] == other["name"] and (one["name"] in IN_MEMORY or _place(one) == _place(other))


OF_MODEL = ("resolution", "channels", "value_range", "fit", "on_bad_image", "num_workers")
"""Settings of a run's data that also apply to another set: what its model needs, and how files are read."""
NO_MATTER = {
    "data": {"name", "root", "num_workers", "on_bad_image", *OF_TRAINING},
    "evaluation": {"every", "batch_size", "projection", "fp16"},
}
"""Settings that change neither which images are compared nor how; `_same_set` compares name and root."""


def _refuse_differences(found: dict[str, Namespace]) -> None:
    """Raise ValueError when runs, by their source, differ in a setting that decides what is compared."""
    if len(found) < 2:
        return
    (first, one), (second, other) = found.items()
    if not _same_set(vars(one.data), vars(other.data)):
        raise ValueError(
            "two models are compared on the same images: name them with --data, since the run of "
            f"{first} used {one.data.name} in {one.data.root}, and that of {second} used {other.data.name} in "
            f"{other.data.root}"
        )
    lines, flags = [], []
    for section in ("data", "objective", "evaluation"):
        for name in vars(one[section]).keys() - NO_MATTER.get(section, set()):
            values = [
                parsed.data.size if name == "resolution" else vars(parsed[section])[name] for parsed in (one, other)
            ]
            if values[0] != values[1]:
                shown = [json.dumps(value) for value in values]
                lines.append(f"{section}.{name} is {shown[0]} for {first} and {shown[1]} for {second}")
                flags.append(f"--{section}.{name} VALUE")
    if lines:
        raise ValueError(
            f"two models are compared under one protocol: give {' '.join(sorted(flags))}, since "
            f"{'; '.join(sorted(lines))}"
        )


def _data_for(model: ModelMixin, parsed: Namespace, source: str) -> dict[str, Any]:
    """How images are read for a model of no run."""
    known = {"resolution": list(_size(model))}
    if (channels := model.config.get("in_channels", 3)) != 1:  # images in colour are not made grey unasked
        known["channels"] = channels
    stated = find_value_range(source, parsed.subfolder, parsed.revision)
    return known | ({"value_range": [stated.low, stated.high]} if stated else {})


def _place(data: dict[str, Any]) -> tuple[str, Path]:
    """Of a set of images: two settings with the same place mean the same."""
    on_hub = data["name"] == "datasets" and is_hub_id(data["root"])
    return data["name"], Path(data["root"]) if on_hub else Path(data["root"]).resolve()


def _of_another_set(known: dict[str, Any], asked: DataConfig, flags: Sequence[str]) -> dict[str, Any]:
    """Settings of a run's data, without what is of its own set alone where `flags` ask for another."""
    if not _names_images(flags) or "name" not in known or _place(known) == _place(vars(asked)):
        return known
    return _read_of(asked, {name: value for name, value in known.items() if name not in (*OF_ROWS, "streaming")})


def _names_images(flags: Sequence[str]) -> bool:
    return any(flag.startswith(("--data.name", "--data.root")) for flag in flags)


ANY_DATA = ["--data.name", "folder"]
"""Before a first look at the arguments: of a folder, anything may be asked for."""


def _settings_of_run(source: str, flags: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Data, objective and evaluation of the run that a folder, or its model/, is of; empty if there is none. The weight
    to which a target_rate has moved is read from its evaluation.json, unless `flags` state one.
    """
    file = config_of_run(source)
    if file is None:
        return {}
    settings = read_settings(file, "data", "objective", "evaluation")
    check_type(settings, NEEDED, str(file))
    settings["evaluation"].pop("every", None)
    data = {name: value for name, value in settings["data"].items() if name not in NOT_MEASURED}
    objective = {name: settings["objective"][name] for name in MEASURED}
    stated = any(flag.startswith("--objective.kl_weight") for flag in flags)
    moved = settings["objective"].get("target_rate") is not None and not stated
    if moved and (report := _report_of_run(source)):
        objective["kl_weight"] = report.kl_weight
    return {"data": data, "objective": objective, "evaluation": settings["evaluation"]}


def _report_of_run(source: str) -> EvaluationReport | None:
    """The evaluation of the finished run that a folder, or its model/, belongs to."""
    file = config_of_run(source)
    path = file and file.parent / "evaluation.json"
    return read_report(path) if path and path.exists() else None


def _objective(parsed: Namespace, *sources: str) -> VAEObjective:
    """The objective to measure with. A learned or optimal scale has the value with which a source's run ended.

    Raises:
        ValueError: when no source has a finished run, or two runs ended with different values.
    """
    if not isinstance(parsed.objective.scale, str):
        return parsed.objective.build()
    scales = {source: report.scale for source in sources if (report := _report_of_run(source))}
    if len(set(scales.values())) > 1:
        raise ValueError(
            "two models are compared under one protocol: give --objective.scale VALUE, since "
            f"objective.scale {parsed.objective.scale} is "
            f"{' and '.join(f'{scale:g} for {source}' for source, scale in scales.items())}"
        )
    return parsed.objective.build(next(iter(scales.values()), None))


def _name(source: str) -> str:
    """Of a model for people: a repository, or the folder without what all runs call theirs."""
    path = Path(source)
    if not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name in ("model", "vae") else path.name
