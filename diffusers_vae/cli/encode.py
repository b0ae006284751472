"""`encode`: writes the latents of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from accelerate import PartialState
from jsonargparse.typing import PositiveInt

from ..data import IN_MEMORY, PLACED, DataConfig
from ..latents.encode import encode_images
from ..latents.shards import DTYPES, Dtype, Kind
from ..messages import quoted, showable
from ..models import Source
from ..processes import one_first
from ..settings import config_of_run
from ..silence import PATIENCE, Patience
from .arguments import MODEL, add_device, add_source, complete, device_of, read_data_flags
from .launched import launched
from .measuring import NOT_MEASURED, data_for, load_images, of_another_set, settings_of_run
from .parser import IMAGES, Parser, command_parser

AnyDtype = Dtype | None
AnySplit = Literal["held-out", "training", "all", None]


def run_encode(arguments: Sequence[str], patience: Patience = PATIENCE) -> int:
    """Encode a data set. `patience` limits how long to wait for processes that stop reporting progress."""
    parser = command_parser(
        "encode",
        "DATA --vae MODEL --out FOLDER [--SECTION.KEY VALUE ...]",
        "Encode a data set once and write the latents, with labels and captions, to a folder, so that training needs "
        "no autoencoder in memory. Repeat the command to continue after an interruption. Settings of the data without "
        "a flag come from the model's run; without a run, channels and resolution come from the model. For several "
        "processes, use `accelerate launch -m diffusers_vae.cli encode ...`.",
        "diffusers-vae encode photos/ --vae runs/mine --out latents/photos --dtype float16",
    )
    parser.add_argument("images", metavar="DATA", help=IMAGES)
    parser.add_argument("--vae", required=True, help=MODEL)
    add_source(parser)
    add_device(parser)
    parser.add_argument("--out", type=str, required=True, help="Folder for the latents.")
    parser.add_argument(
        "--kind",
        type=Kind,
        default="posterior",
        help="What to store; posterior: mean and logvar, to sample from later; sample: one sample; mode: the mean.",
    )
    parser.add_argument(
        "--dtype", type=Dtype, default="float32", help="Dtype of the stored values; the weights are float32."
    )
    parser.add_argument(
        "--compute_dtype",
        type=AnyDtype,
        default=None,
        help="Dtype of the encoder's computation; null: as in a FOLDER that is continued, else bfloat16 where hardware "
        "supports it, else float32 (docs/latents.md).",
    )
    parser.add_argument(
        "--split",
        type=AnySplit,
        default=None,
        help="Images to encode; null: the training images, or all images of a folder without parts.",
    )
    parser.add_argument(
        "--captions",
        type=bool,
        default=True,
        help="Read captions from metadata.jsonl, metadata.csv, NAME.txt, NAME.caption or NAME.json.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples of --kind sample.")
    parser.add_argument(
        "--batch_size",
        type=cast(Any, PositiveInt) | None,
        default=None,
        help="Number of images per forward pass on each process; null: chosen for the device.",
    )
    parser.add_argument("--shard_images", type=PositiveInt, default=4096, help="Number of images per file.")
    parser.add_section("data", DataConfig, skip=NOT_MEASURED)
    with launched("encoding", patience, "The same command continues after the last whole shards") as state:
        _encode(parser, arguments, state)
    return 0


def _encode(parser: Parser, arguments: Sequence[str], state: PartialState) -> None:
    given = read_data_flags(parser, arguments)
    parsed = complete(parser, given)  # report wrong settings before loading a model
    if "root" in given.data and parsed.data.name != "datasets" and not Path(parsed.images).exists():
        raise FileNotFoundError(
            f"DATA must be {', '.join(IN_MEMORY)}, a folder or archive of images, an array, Parquet, or "
            f"NAMESPACE/NAME on the Hub, got {parsed.images}"
        )
    vae = Source(parsed.vae, parsed.subfolder, parsed.revision).model().to(device_of(parsed))
    stored = settings_of_run(parsed.vae).get("data") or data_for(vae, parsed, parsed.vae)
    stored = of_another_set(stored, parsed.data)
    if stored.get("name") in PLACED:  # other sets must not be downloaded into its root
        stored.pop("root", None)
    stored = {f"data.{name}": value for name, value in stored.items()}
    parsed = complete(parser, given, stored, config_of_run(parsed.vae))
    with one_first(state.is_local_main_process, "reading the data set"):
        images, split = load_images(
            parsed, [parsed.vae], state.is_local_main_process, parsed.captions, default="training"
        )
    if state.is_main_process:
        print(showable(f"data        {images.files}"), flush=True)
    data, unreadable = parsed.data, len(images.errors)  # found so far; a set read on demand loses rows later
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
        folder = quoted(Path(parsed.out).absolute())
        print(f"open it     from diffusers_vae import LatentDataset; latents = LatentDataset({folder})")
