"""A page in the browser on which people try autoencoders on their own images. It needs gradio."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import torch

from ..models import MLPVAE, Source
from . import markup
from .explore import (
    MOST_MODELS,
    Directions,
    Explored,
    Reconstruction,
    between,
    moved,
    prior_samples,
    reconstruct_file,
    telling_directions,
)

T = TypeVar("T")

SLIDERS = 6
SAMPLES = 32
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of what takes a visitor's state, which no API client has
EMPTY = "Choose an image above."


def show(sources: Sequence[str], revision: str | None = None) -> None:
    """Load models from repositories or folders, on a GPU if there is one, and serve the page until the process ends:
    the app.py of a Space.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    found = [Source(source, revision=revision) for source in sources]
    models = [Explored(one.name, one.model().to(device), one.value_range()) for one in found]
    serve(models)[0].block_thread()


def serve(models: Sequence[Explored], host: str | None = None, port: int | None = None) -> tuple[gr.Blocks, str]:
    """Serve the page from other threads, and return it with its address. `host` and `port` are gradio's by default:
    GRADIO_SERVER_NAME or 127.0.0.1, and the first free port from 7860.

    Raises:
        OSError: when the port is taken.
    """
    page = build(models)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        max_file_size="100mb",
        footer_links=[],
        theme=gr.themes.Default(font=FONT, font_mono=MONO),  # others load fonts from Google
        css_paths=Path(__file__).with_name("demo.css"),
    )
    return page, address


@dataclass(frozen=True)
class Seen:
    """A visitor's image, and what each model made of it."""

    file: Path
    made: list[Reconstruction]


@dataclass(frozen=True)
class Answers:
    """What the page answers to a visitor's actions."""

    models: Sequence[Explored]

    def look(self, file: str | None) -> tuple[Seen | None, str, str]:
        """Return what each model makes of an image, its reconstructions and its latent channels."""
        if file is None:
            return None, EMPTY, EMPTY
        made = [_or_told(reconstruct_file, explored, Path(file)) for explored in self.models]
        return (
            Seen(Path(file), made),
            markup.reconstructions(self.models, made),
            markup.latent_channels(self.models, made),
        )

    def find_directions(self, seen: Seen | None, index: int) -> list[Any]:
        """Return a model's index and directions, the picture at their origin, the button and the sliders."""
        if seen is None:
            return [None, EMPTY, gr.Button(visible=False), *[gr.Slider(visible=False)] * SLIDERS]
        model, made = self.models[index].model, seen.made[index]
        found = telling_directions(model, made.posterior, SLIDERS)
        words = [markup.slider_words(model, found, k) for k in range(len(found.vectors))]
        sliders = [gr.Slider(value=0, visible=True, label=label, info=info) for label, info in words]
        sliders += [gr.Slider(value=0, visible=False)] * (SLIDERS - len(sliders))
        return [(index, found), markup.shifted(made, made.reconstruction), gr.Button(visible=True), *sliders]

    def shift(self, seen: Seen | None, directions: tuple[int, Directions] | None, *amounts: float) -> str:
        """Return the picture with the latents shifted as the sliders say."""
        if seen is None or directions is None:
            return EMPTY
        index, found = directions
        made = seen.made[index]
        return markup.shifted(made, moved(self.models[index].model, made, found, [*amounts]))

    def interpolate(self, seen: Seen | None, file: str | None) -> str:
        """Return the ways of all models from one image to another."""
        if seen is None or file is None:
            return "Choose two images: the first at the top, the second above."
        ways = [_or_told(between, explored, seen.file, Path(file)) for explored in self.models]
        return markup.interpolations(self.models, ways)

    def sample(self, seed: float | None) -> str:
        """Return samples of the models whose prior they come from, the MLPs."""
        drawn = [
            (explored, prior_samples(explored.model, SAMPLES, int(seed or 0)))
            for explored in self.models
            if isinstance(explored.model, MLPVAE)
        ]
        return markup.samples([explored for explored, _ in drawn], [images for _, images in drawn])


def build(models: Sequence[Explored]) -> gr.Blocks:
    """Build the page; ValueError unless there are 1 to `MOST_MODELS` models."""
    if not 1 <= len(models) <= MOST_MODELS:
        raise ValueError(f"the demo shows 1 to {MOST_MODELS} models side by side, got {len(models)}")
    answers, names = Answers(models), [explored.name for explored in models]
    # what no browser shows, such as a TIFF file of five channels, is chosen as a file
    as_file = any(explored.value_range or explored.model.config.in_channels not in (1, 3) for explored in models)
    with gr.Blocks(title="diffusers_vae", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        heading = " and ".join(names) if len(names) < 3 else "Autoencoders side by side"
        gr.HTML(f"<h1 style='overflow-wrap: anywhere'>{html.escape(heading)}</h1>", padding=False)
        seen, directions = gr.State(None), gr.State(None)
        image = _image_input("Image", "image", as_file)
        with gr.Tab("Reconstruction"):
            reconstructions = gr.HTML(EMPTY, elem_id="reconstructions")
        with gr.Tab("Latent channels"):
            channels = gr.HTML(EMPTY, elem_id="channels")
        with gr.Tab("Directions"):
            chosen = gr.Radio(names, value=names[0], label="Model", type="index", visible=len(names) > 1)
            picture = gr.HTML(EMPTY, elem_id="shifted")
            sliders = [
                gr.Slider(-markup.REACH, markup.REACH, 0, step=0.1, visible=False, elem_id=f"direction-{k + 1}")
                for k in range(SLIDERS)
            ]
            reset = gr.Button("Set all to 0", size="sm", visible=False, elem_id="reset")
        with gr.Tab("Interpolation"):
            other = _image_input("Second image", "second-image", as_file)
            way = gr.HTML(answers.interpolate(None, None), elem_id="interpolation")
        if any(isinstance(explored.model, MLPVAE) for explored in models):
            with gr.Tab("Samples"):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                samples = gr.HTML(answers.sample(0), elem_id="samples")
            seed.change(answers.sample, seed, samples, **PRIVATE)

        found = [directions, picture, reset, *sliders]
        looked = image.change(answers.look, image, [seen, reconstructions, channels], **PRIVATE)
        looked = looked.success(answers.find_directions, [seen, chosen], found, **PRIVATE)
        looked.success(answers.interpolate, [seen, other], way, **PRIVATE)
        chosen.change(answers.find_directions, [seen, chosen], found, **PRIVATE)
        other.change(answers.interpolate, [seen, other], way, **PRIVATE)
        reset.click(lambda: [0] * SLIDERS, None, sliders, **PRIVATE)
        gr.on(
            [slider.change for slider in sliders],
            answers.shift,
            [seen, directions, *sliders],
            picture,
            trigger_mode="always_last",  # while one slides, positions between may be left out
            show_progress="hidden",
            **PRIVATE,
        )
    return page


def _image_input(label: str, name: str, as_file: bool) -> Any:
    if as_file:
        return gr.File(label=label, type="filepath", elem_id=name)
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240, elem_id=name
    )


def _or_told(function: Callable[..., T], *arguments: Any) -> T:
    """Return what `function` returns; what is wrong with a file is shown on the page."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
