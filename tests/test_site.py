"""`mkdocs build --strict` makes a whole site of the README, docs/*.md and the docstrings."""

import json
import os
import re
from collections import Counter
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import get_type_hints
from urllib.parse import unquote, urlsplit

import pytest
from support.models import tiny_vae

import diffusers_vae
from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.evaluation.evaluate import EvaluationConfig, evaluate
from diffusers_vae.losses.objective import ObjectiveConfig
from diffusers_vae.tasks.autoencoder_config import TrainConfig
from diffusers_vae.tasks.text_to_image_config import TextToImageConfig

ROOT = Path(__file__).parents[1]


class Parts(HTMLParser):
    """The anchors of a page, what it links to, what it loads, and the text of its paragraphs."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.paragraphs, self.in_paragraph = [], [], [], [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        loads = tag in ("img", "script", "source", "iframe") and found.get("src")
        loads = loads or (tag == "link" and found.get("rel") != "canonical" and found.get("href"))
        self.loaded += [loads] if loads else []
        if tag == "p":
            self.in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        self.in_paragraph = self.in_paragraph and tag != "p"

    def handle_data(self, data):
        if self.in_paragraph:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="needs the docs extra: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("built") / "site"
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Parts(path) for path in site.rglob("*.html")}


@pytest.mark.slow
class TestSite:
    def test_links_and_pictures_lead_to_files_of_the_site(self, site, pages):
        for page, parts in pages.items():
            if page.name == "404.html":  # which has absolute links
                continue
            for link in (*parts.links, *parts.loaded):
                url = urlsplit(link)
                if url.scheme or link in (".", ".."):
                    continue
                target = page if not url.path else (page.parent / unquote(url.path)).resolve()
                target = target / "index.html" if target.is_dir() else target
                assert target.exists(), f"{page}: {link}"
                if url.fragment and target in pages:
                    assert unquote(url.fragment) in (*pages[target].ids, "__skip"), f"{page}: {link}"

    def test_site_loads_nothing_from_elsewhere(self, site, pages):
        for page, parts in pages.items():
            assert not [link for link in parts.loaded if urlsplit(link).netloc], page
        for style in site.rglob("*.css"):
            assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style

    def test_lists_and_tables_are_no_paragraphs(self, pages):
        """Markdown that GitHub shows as a list or table and Python-Markdown as text."""
        for page, parts in pages.items():
            for text in parts.paragraphs if page.parent.name != "api" else ():  # docstrings break lines in formulas
                assert not re.search(r"^\s*([-*|]|\d+\.) ", text, re.M), f"{page}: {text}"

    def test_every_page_of_docs_is_in_the_navigation(self, site, pages):
        start = pages[site / "index.html"].links
        for page in (ROOT / "docs").glob("*.md"):
            assert f"{page.stem}/" in start, f"{page} is missing in nav in mkdocs.yml"

    def test_settings_are_listed_once(self, site, pages):
        anchors = Counter(pages[site / "settings" / "index.html"].ids)
        for name, kind in get_type_hints(TrainConfig).items():
            for option in fields(kind):
                assert anchors[f"{name}.{option.name}"] == 1, f"{name}.{option.name}"
        shared = get_type_hints(TrainConfig).values()
        for name, kind in get_type_hints(TextToImageConfig).items():
            for option in fields(kind):
                assert anchors[f"text-to-image.{name}.{option.name}"] == (kind not in shared), f"{name}.{option.name}"

    def test_public_names_are_described(self, site, pages):
        anchors = pages[site / "api" / "index.html"].ids
        assert {f"diffusers_vae.{name}" for name in diffusers_vae.__all__} <= set(anchors)

    def test_keys_of_a_report_are_described(self, site, pages):
        anchors = pages[site / "evaluation_schema" / "index.html"].ids
        images = load_data(DataConfig(resolution=8))[1]
        report = evaluate(tiny_vae(), images, ObjectiveConfig().build(), EvaluationConfig(max_images=2))
        values = json.loads(report.to_json())
        keys = {f"key-{key}" for key in values} | {
            f"key-{key}.{inner}" for key in ("latents", "posterior", "model", "protocol") for inner in values[key]
        }
        assert keys - {"key-format", "key-sha256"} <= set(anchors)

    def test_pictures_of_docs_are_shown(self, site, pages):
        shown = {Path(path).name for path in pages[site / "pictures" / "index.html"].loaded}
        assert {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")} <= shown
