"""`encode`: the latents of a data set."""

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
    """The latents of a data set. Processes that fall silent are waited for with `patience`."""
    parser = command_parser(
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
    add_source(parser)
    add_device(parser)
    parser.add_argument("--out", type=str, required=True, help="Folder for the latents.")
    parser.add_argument(
        "--kind",
        type=Kind,
        default="posterior",
        help="posterior: mean and logvar, from which each epoch can draw anew. sample: one draw. mode: the mean.",
    )
    parser.add_argument("--dtype", type=Dtype, default="float32", help="Of the stored values; the weights are float32.")
    parser.add_argument(
        "--compute_dtype",
        type=AnyDtype,
        default=None,
        help="In which the encoder runs, as the result says. By default as FOLDER was begun, if it was; else bfloat16 "
        "where the device multiplies it in hardware, and float32 elsewhere. How far apart they are: docs/latents.md.",
    )
    parser.add_argument(
        "--split",
        type=AnySplit,
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
        type=cast(Any, PositiveInt) | None,
        default=None,
        help="Images per forward on one process; by default as many as keep a CPU's caches or a GPU busy.",
    )
    parser.add_argument("--shard_images", type=PositiveInt, default=4096, help="Images per file.")
    parser.add_section("data", DataConfig, skip=NOT_MEASURED)
    with launched("encoding", patience, "The same command continues after the last whole shards") as state:
        _encode(parser, arguments, state)
    return 0


def _encode(parser: Parser, arguments: Sequence[str], state: PartialState) -> None:
    given = read_data_flags(parser, arguments)
    parsed = complete(parser, given)  # wrong ones are told before a model is loaded
    if "root" in given.data and parsed.data.name != "datasets" and not Path(parsed.images).exists():
        raise FileNotFoundError(
            f"DATA must be {', '.join(IN_MEMORY)}, a folder or archive of images, an array of them, Parquet, or "
            f"NAMESPACE/NAME on the Hub, got {parsed.images}"
        )
    vae = Source(parsed.vae, parsed.subfolder, parsed.revision).model().to(device_of(parsed))
    known = settings_of_run(parsed.vae).get("data") or data_for(vae, parsed, parsed.vae)
    known = of_another_set(known, parsed.data)
    if known.get("name") in PLACED:  # whose root is no place for other sets
        known.pop("root", None)
    known = {f"data.{name}": value for name, value in known.items()}
    parsed = complete(parser, given, known, config_of_run(parsed.vae))
    with one_first(state.is_local_main_process, "reading the data set"):
        images, split = load_images(
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
