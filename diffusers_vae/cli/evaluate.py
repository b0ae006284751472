"""`evaluate`, `compare` and `fp16`: measure models on images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from jsonargparse.typing import PositiveInt

from ..data import ImageSet
from ..evaluation.compare import compare
from ..evaluation.evaluate import EvaluationConfig, evaluate, reconstruct
from ..evaluation.float16 import measure_precision
from ..evaluation.report import EvaluationReport
from ..images.ranges import to_model_range
from ..messages import showable
from ..models import Source, encode
from ..models.stock import ModelMixin
from ..processes import on_main, one_first
from ..reports.html import draw_report, report_html
from ..reports.pictures import comparison_picture
from ..reports.tables import comparison_table, precision_table, report_table
from ..silence import PATIENCE, Patience
from ..storage import whole_files, write_file, write_text
from ..untrusted import read_json
from .arguments import MODEL, add_device, add_source
from .launched import launched
from .measuring import add_images, add_measuring, load_images, name_of, objective_of, parse_measuring
from .parser import Parser, command_parser


def run_evaluate(arguments: Sequence[str], patience: Patience = PATIENCE) -> int:
    """Measure one model. `patience` limits how long to wait for processes that stop reporting progress."""
    parser = command_parser(
        "evaluate",
        "MODEL [--data NAME|FOLDER] [--SECTION.KEY VALUE ...]",
        "Measure an autoencoder. Prints the figures, and writes evaluation.json, evaluation.csv, report.html and "
        "pictures/ to a folder. Settings without a flag come from the model's run; without a run, channels and "
        "resolution come from the model. For several processes, use `accelerate launch -m diffusers_vae.cli evaluate "
        "...`.",
        "diffusers-vae evaluate stabilityai/sd-vae-ft-mse --data photos/ --data.resolution 256 --evaluation.rfid true",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--fp16", type=bool, default=False, help="Also measure the model in float16, as `diffusers-vae fp16` does."
    )
    add_measuring(parser)
    with launched("the evaluation", patience, "Repeat the command to measure again") as state:
        _evaluate(parser, arguments, state)
    return 0


def _evaluate(parser: Parser, arguments: Sequence[str], state: PartialState) -> None:
    parsed, (model,) = parse_measuring(parser, arguments, ["model"])
    with one_first(state.is_local_main_process, "reading the data set"):
        images, split = load_images(parsed, [parsed.model], state.is_local_main_process)
    if state.is_main_process:
        print(showable(f"data        {images.files}"), flush=True)
    name = name_of(parsed.model)
    out = Path(parsed.out or Path("evaluations") / name.replace("/", "--"))
    # fail before measuring if the folder cannot be written
    on_main(lambda: (out / "pictures").mkdir(parents=True, exist_ok=True))
    objective = objective_of(parsed, parsed.model)
    report = evaluate(model, images, objective, parsed.evaluation, parsed.data, split, name, True, parsed.fp16)
    on_main(lambda: _write_evaluation(out, report, model, images, parsed.evaluation))


def _write_evaluation(
    out: Path, report: EvaluationReport, model: ModelMixin, images: ImageSet, config: EvaluationConfig
) -> None:
    text = report.to_json()
    print(report_table(json.loads(text)))
    with whole_files(out) as partial:
        write_text(partial / "evaluation.json", text)
        write_text(partial / "evaluation.csv", report.measured.to_csv())
        pictures = draw_report(model, images, None, config, report)
        (partial / "pictures").mkdir()
        for name, picture in pictures.items():
            picture.save(partial / "pictures" / f"{name}.png")
        write_text(partial / "report.html", report_html(json.loads(text), pictures, report.model.name))
    print(showable(f"report      {out / 'report.html'}"))
    print(showable(f"evaluation  {out / 'evaluation.json'}"))


def run_compare(arguments: Sequence[str]) -> int:
    """Compare two models image by image."""
    parser = command_parser(
        "compare",
        "FIRST SECOND [--data NAME|FOLDER] [--SECTION.KEY VALUE ...]",
        "Compare two autoencoders image by image under one protocol. Prints the differences, SECOND minus FIRST, with "
        "confidence intervals, and writes comparison.json and comparison.png to a folder. Settings without a flag come "
        "from the models' runs; settings that differ between two runs need a flag.",
        "diffusers-vae compare stabilityai/sd-vae-ft-mse runs/mine --data photos/ --data.resolution 256",
    )
    parser.add_argument("first", help=MODEL)
    parser.add_argument("second", help=MODEL)
    add_measuring(parser)
    parsed, models = parse_measuring(parser, arguments, ["first", "second"])
    images, split = load_images(parsed, [parsed.first, parsed.second], True)
    print(showable(f"data        {images.files}"), flush=True)
    names = [name_of(parsed.first), name_of(parsed.second)]
    if names[0] == names[1]:  # two folders with the same name
        names = [parsed.first, parsed.second]
    out = Path(parsed.out or Path("comparisons") / "--vs--".join(name.strip("./").replace("/", "--") for name in names))
    out.mkdir(parents=True, exist_ok=True)
    _check_images(models, names, images)
    objective = objective_of(parsed, parsed.first, parsed.second)
    reports = [
        evaluate(model, images, objective, parsed.evaluation, parsed.data, split, name, True)
        for model, name in zip(models, names, strict=True)
    ]
    comparison = compare(reports[0], reports[1])
    text = comparison.to_json()
    print(comparison_table(json.loads(text)))
    shown = [reports[0].measured.indices[index] for index in comparison.most_different]
    originals = to_model_range(images.read(shown).checked().pixels.to(models[0].device))
    with torch.no_grad():
        first, second = (reconstruct(model, originals, shown, parsed.evaluation) for model in models)
    captions = [
        ", ".join(f"{report.measured.figures['psnr'][index]:.2f}" for report in reports) + " dB"
        for index in comparison.most_different
    ]
    picture = comparison_picture(originals.cpu(), first.cpu(), second.cpu(), (names[0], names[1]), captions)
    with whole_files(out) as partial:
        write_text(partial / "comparison.json", text)
        picture.save(partial / "comparison.png")
    print(showable(f"comparison  {out / 'comparison.json'}"))
    print(showable(f"picture     {out / 'comparison.png'}"))
    return 0


@torch.no_grad()
def _check_images(models: Sequence[ModelMixin], names: Sequence[str], images: ImageSet) -> None:
    """Raise ValueError if a model cannot encode the images, before any model is measured."""
    pixels = images.read([0]).pixels
    for model, name in zip(models, names, strict=True):
        try:
            if len(pixels):
                encode(model, to_model_range(pixels.to(model.device)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def run_fp16(arguments: Sequence[str]) -> int:
    """Check whether a model can run in float16."""
    parser = command_parser(
        "fp16",
        "MODEL [--data NAME|FOLDER] [--write true]",
        "Check whether an autoencoder can run in float16. Reports the largest activation of each block on real images, "
        "the error of a run in float16, and whether force_upcast can be false. Pipelines in float16 run the "
        "autoencoder in float32 if force_upcast is true. Settings of the data without a flag come from the "
        "model's run; without a run, channels and resolution come from the model.",
        "diffusers-vae fp16 runs/mine --write true",
    )
    parser.add_argument("model", help=MODEL)
    add_source(parser)
    add_device(parser)
    add_images(parser)
    parser.add_argument("--max_images", type=PositiveInt, default=256, help="Maximum number of images to measure.")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="Number of images per forward pass.")
    parser.add_argument(
        "--write",
        type=bool,
        default=False,
        help="Set force_upcast to false in the model's config.json if that is safe.",
    )
    parsed, (model,) = parse_measuring(parser, arguments, ["model"])
    file = _config_file(Source(parsed.model, parsed.subfolder))
    if parsed.write and "force_upcast" not in model.config:
        raise ValueError(f"--write sets force_upcast, which {type(model).__name__} does not have")
    if parsed.write and not file:
        kind = "a single file" if Path(parsed.model).is_file() else "a repository"
        raise ValueError(
            f"--write needs a model folder with a config.json on this machine, but {parsed.model} is {kind}"
        )
    images, _ = load_images(parsed, [parsed.model], True)
    report = measure_precision(model, images, parsed.batch_size, parsed.max_images, True)
    print(precision_table(asdict(report)))
    if not parsed.write or not file:
        return 0
    if not report.safe:
        raise ValueError(f"{file} was not changed. {report.advice}")
    config = read_json(file)
    if config.get("force_upcast") is False:
        print(showable(f"force_upcast was already false in {file}"))
        return 0
    write_file(file, json.dumps(config | {"force_upcast": False}, indent=2) + "\n")
    print(showable(f"force_upcast is now false in {file}"))
    return 0


def _config_file(source: Source) -> Path | None:
    """Return the config.json that `load_autoencoder` reads if `source` is a folder, else None."""
    file = Path(source.name, source.inside or "", "config.json")
    return file if file.is_file() else None
