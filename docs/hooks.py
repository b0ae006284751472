"""Pages of the site besides docs/*.md: the README, files of the repository that pages link to, and generated pages."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from diffusers_vae.evaluation.report import EvaluationReport, PerImage
from diffusers_vae.fields import in_words, shown
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.text_to_image_config import TextToImageConfig

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
ORDER = "presets fine_tuning images text_to_image evaluation objective kl_weight latents runs scale sharing pipeline"
"""Guides in the order of the navigation; others follow."""
LINK = re.compile(r"(\[[^\]\[]*)?\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")
"""A link or picture with a relative path: its text, the path and the anchor."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README, everything outside docs/ that a page links to, and the generated pages."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    pictures = {}
    for page in pages:  # which grows
        for text, target in links(page):
            if target.suffix == ".png" and target.parent == DOCS / "pictures":
                pictures.setdefault(target, (text, page))
            elif not target.is_relative_to(DOCS) and uri_of(target) not in files.src_uris:
                files.append(outside(target, config))
                pages += [target] * (target.suffix == ".md")
    generated = {
        "settings.md": settings_page(),
        "evaluation_schema.md": evaluation_page(),
        "examples.md": examples_page(),
        "pictures.md": pictures_page(pictures),
    }
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    for section in config.nav or ():
        if "Guides" in section:
            section["Guides"] = guides({uri for entry in config.nav for uri in entry.values() if isinstance(uri, str)})
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        if uri_of(notebook) not in files.src_uris:
            files.append(outside(notebook, config))
    return files


def guides(named: set[str]) -> list[str]:
    """Return the pages of docs/ that the navigation does not name."""
    names, order = [page.stem for page in sorted(DOCS.glob("*.md")) if page.name not in named], ORDER.split()
    return [f"{name}.md" for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order))]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let relative links, which are those of the repository, lead to pages of the site; a folder that is no page
    becomes text.
    """
    markdown = re.sub(r"^```(\w+) .*$", r"```\1", markdown, flags=re.M)  # notes for the tests
    source = page.file.abs_src_path
    if source is None:
        return markdown

    def in_site(link: re.Match[str]) -> str:
        text, path, anchor = link.groups(default="")
        target = target_of(Path(source), path)
        if target.is_dir():
            return text.removeprefix("[")
        if not target.exists():  # which mkdocs reports
            return link[0]
        return f"{text}]({os.path.relpath(uri_of(target), Path(page.file.src_uri).parent)}{anchor})"

    markdown = LINK.sub(in_site, markdown)
    return markdown + preset_files() if page.file.src_uri == "presets.md" else markdown


def preset_files() -> str:
    """Return the files of the presets, for the end of their page."""
    presets = sorted((ROOT / "training" / "configs").glob("*.yaml"))
    return "\n\n## Files\n\n" + "\n".join(f"### {path.stem}\n\n{fenced(path)}" for path in presets)


def links(page: Path) -> Iterator[tuple[str, Path]]:
    """Yield the text and the file of each relative link of a page."""
    for text, path, _ in LINK.findall(page.read_text(encoding="utf-8")):
        target = target_of(page, path)
        if target.is_file():
            yield text.removeprefix("["), target


def target_of(page: Path, path: str) -> Path:
    """Return the file or folder that a relative link leads to; of a folder with a README, that file."""
    target = (page.parent / path).resolve()
    readme = target / "README.md"
    return readme if readme.exists() else target


def uri_of(path: Path) -> str:
    """Return where a file of the repository is in the site."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    uri = path.relative_to(ROOT).as_posix()
    return uri if path.suffix in (".md", ".png", ".ipynb") else f"{uri}.md"


def outside(path: Path, config: MkDocsConfig) -> File:
    """Return a file outside docs/ as a file of the site; source text as a page."""
    uri = uri_of(path)
    if uri == path.relative_to(ROOT).as_posix():
        return File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
    content = f"# {path.name}\n\n{fenced(path)}"
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def fenced(path: Path) -> str:
    return f"````{path.suffix[1:] or 'text'}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"


def settings_page() -> str:
    """Return the page of all settings, from the dataclasses."""
    parts = [SETTINGS]
    seen: dict[type, str] = {}
    for command, config in {"train": TrainConfig, "train-text-to-image": TextToImageConfig}.items():
        parts.append(f"## diffusers-vae {command}")
        kinds = get_type_hints(config)
        for section in fields(config):
            kind, name = kinds[section.name], section.name
            made = None if section.default_factory is MISSING else section.default_factory()
            if kind in seen:
                parts.append(f"### {name}\n\n{other_defaults(kind, name, made)}")
                continue
            seen[kind] = name
            title = name if name not in list(seen.values())[:-1] else f"{name} of text to image"
            parts.append(f"### {title}\n\n{parse_from_object(kind).description}")
            parts += [setting_entry(kind, name, option, made, config) for option in fields(kind)]
    return "\n\n".join(parts)


SETTINGS = """# Settings

Write a setting as a flag, `--run.epochs 4`, or in a YAML file that `--config` names. Flags override the file.
"May change": an interrupted run can continue with another value."""


def other_defaults(kind: type, name: str, made: Any) -> str:
    """Return a sentence on a section that two commands share."""
    changed = [
        f"`{name}.{option.name}` {shown(getattr(made, option.name))}"
        for option in fields(kind)
        if made is not None and getattr(made, option.name) != option.default
    ]
    text = f"The settings of [`{name}`](#{name}) above"
    return f"{text}, with other defaults: {', '.join(changed)}." if changed else f"{text}, with the same defaults."


def setting_entry(kind: type, section: str, option: Any, made: Any, config: type) -> str:
    """Return a setting with its help, its default and its values, as an entry of a definition list."""
    metadata = option.metadata
    default = option.default if made is None else getattr(made, option.name)
    facts = [
        f"Default: `{shown(default)}`",
        f"value: {in_words(get_type_hints(kind)[option.name], metadata.get('bounds', {}))}",
    ]
    facts += [only_with(section, *condition) for condition in metadata.get("only_with", {}).items()]
    facts += ["may change"] * ("free" in metadata.get("traits", ()))
    anchor = f"{section}.{option.name}" if config is TrainConfig else f"text-to-image.{section}.{option.name}"
    text = re.sub(r"docs/(\w+\.md)", r"[docs/\1](\1)", help_of(kind)[option.name])
    return f"`{section}.{option.name}`{{ #{anchor} }}\n:   {text}\n\n    {' · '.join(facts)}"


def only_with(section: str, other: str, wanted: bool | tuple[Any, ...]) -> str:
    """Return the condition under which a setting is read."""
    name = f"`{section}.{other}`"
    if isinstance(wanted, bool):
        return f"only {'with' if wanted else 'without'} {name}"
    return f"only with {name} {' or '.join(map(shown, wanted))}"


def help_of(kind: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    described = parse_from_object(kind).params
    return {field.arg_name: " ".join((field.description or "").split()) for field in described}


def evaluation_page() -> str:
    """Return the page of the keys of evaluation.json, from the dataclass of the report."""
    return "\n\n".join([EVALUATION, *entries_of("", EvaluationReport)])


EVALUATION = """# evaluation.json

Each key of the file, with its type. `None` is null in the file. The file also holds `format`, the version of this
schema, and `sha256`, the checksum of the rest. [Evaluation](evaluation.md) defines the figures."""


def entries_of(name: str, kind: type) -> Iterator[str]:
    """Yield the keys of an object in evaluation.json, then those of the objects in it."""
    kinds, texts, inner = get_type_hints(kind), help_of(kind), []
    yield f"## {f'`{name}`' if name else 'Top level'}\n\n{parse_from_object(kind).description}"
    for field in fields(kind):
        full = f"{name}.{field.name}".lstrip(".")
        parts = [own for own in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(own)]
        if PerImage in parts:  # which is in evaluation.csv
            continue
        inner += [(full, part) for part in parts]
        text = texts.get(field.name) or f"See [`{full}`](#{full.replace('.', '')})."
        annotation = "object" + " | None" * (kinds[field.name] not in parts) if parts else field.type
        yield f"`{full}`{{ #key-{full} }}\n:   `{annotation}`: {text}"
    for full, part in inner:
        yield from entries_of(full, part)


def examples_page() -> str:
    """Return the page with the scripts of examples/."""
    parts = [
        "# Examples",
        "The notebook [examples/digits.ipynb](examples/digits.ipynb) trains on digits, shows pictures, "
        "and goes on to text to image. It needs three minutes on a CPU.",
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        purpose = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        parts.append(f"## {path.name}\n\n{purpose}\n\n{fenced(path)}")
    return "\n\n".join(parts)


def pictures_page(pictures: dict[Path, tuple[str, Path]]) -> str:
    """Return the page with the pictures of docs/, each with its text and a link to the page that explains it."""
    parts = ["# Pictures"]
    for path, (text, page) in pictures.items():
        uri = uri_of(page)
        heading = re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.M)
        parts.append(f"## {text}\n\n![{text}]({uri_of(path)})\n\nFrom [{heading[1] if heading else uri}]({uri}).")
    return "\n\n".join(parts)
