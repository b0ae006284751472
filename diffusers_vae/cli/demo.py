"""`demo`: serves a page to try autoencoders in the browser."""

from __future__ import annotations

from collections.abc import Sequence

from ..models import Source
from ..reports.explore import MOST_MODELS, Explored
from .arguments import MODEL, add_loading, load, parse
from .measuring import name_of
from .parser import command_parser


def run_demo(arguments: Sequence[str]) -> int:
    """Serve the page."""
    parser = command_parser(
        "demo",
        "MODEL [MODEL ...] [--host ADDRESS] [--port N]",
        "Serve a page that compares up to four autoencoders on an image: reconstructions, latent channels, sliders "
        "along latent directions, interpolation, and samples from MLPs. Nothing leaves the machine.",
        "diffusers-vae demo runs/mine stabilityai/sd-vae-ft-mse",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    add_loading(parser)
    parser.add_argument(
        "--host",
        type=str,
        default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 accepts connections from other machines.",
    )
    parser.add_argument("--port", type=int | None, default=None, help="Port; null: the first free one from 7860.")
    parsed = parse(parser, arguments)
    if len(parsed.models) > MOST_MODELS:
        parser.exit(2, f"error: the demo shows up to {MOST_MODELS} models side by side, got {len(parsed.models)}\n")
    try:
        from ..reports.demo import serve  # gradio takes seconds to import
    except ModuleNotFoundError as error:
        raise ImportError(
            f'diffusers-vae demo needs {error.name}, which is not installed: pip install "diffusers-vae[demo]"'
        ) from error
    models = [
        Explored(name, load(parsed, source), Source(source, parsed.subfolder, parsed.revision).value_range())
        for name, source in zip(_names(parsed.models), parsed.models, strict=True)
    ]
    page, address = serve(models, parsed.host, parsed.port)
    print(f"demo        {address} (Ctrl-C stops it)", flush=True)
    page.block_thread()
    return 0


def _names(sources: Sequence[str]) -> list[str]:
    """Return a short name for each model, or its path if several share that name."""
    short = [name_of(source) for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
