"""The report as a page and as a table: whole, self-contained, and with the numbers that were measured."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vae.data import Look
from diffusers_vae.data.look import FileFigures
from diffusers_vae.reports.html import report_html
from diffusers_vae.reports.tables import comparison_table, look_table, precision_table, report_table


def make_report(**changes):
    return {
        "images": 1234,
        "loss": 216.15402052137586,
        "distortion": -1345.2740003797744,
        "rate": 144.5738861931695,
        "elbo": 1200.7001125759548,
        "bits_per_dim": -1.691644626961084,
        "density": "normal density with std 0.1 over pixels in [-1, 1]",
        "psnr": 37.78559912575616,
        "ssim": 0.9878865006897185,
        "lpips_alex": 0.0312,
        "lpips_vgg": None,
        "rfid": None,
        "importance_weighted_bound": None,
        "intervals": {"psnr": [37.5, 38.0625], "rate": [143.25, 146.0]},
        "latents": {"mean": [0.1, -0.2], "std": [1.5, 0.75], "scaling_factor": 1.0076736, "shift_factor": 0.0068563},
        "posterior": {
            "units": 128,
            "active_units": 70,
            "empty_share": 0.45,
            "rate_per_channel": [100.0, 44.5],
            "information_per_channel": [90.0, 40.5],
            "swaps": {"images": 64, "all": 21.5, "colour": None, "channels": [10.25, 3.5]},
            "rate_per_position": [[1.0] * 8] * 8,
            "aggregate_distance": 0.23,
            "verdict": "partly collapsed",
            "advice": "Lower objective.kl_weight & measure again.",
        },
        "model": {
            "name": "runs/<b>digits</b>/model",
            "class_name": "AutoencoderKL",
            "parameters": 186233,
            "latent_shape": [2, 8, 8],
            "scaling_factor": 1.0076736,
            "shift_factor": 0.0068563,
            "weights_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        },
        "protocol": {
            "data": "folder " + "very_long_name_without_a_space" * 6,
            "split": "held-out",
            "images": 1234,
            "fingerprint": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
            "resolution": [32, 48],
            "channels": 1,
            "fit": "crop",
            "resize": "bicubic, antialiased",
            "value_range": [-1.0, 1.0],
            "round_to_8_bit": False,
            "reconstruction": "mode",
            "draws": 1,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "versions": {"torch": "2.15.0", "diffusers": "0.42.1"},
        },
        **changes,
    }


def make_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (500, 1100, 3), dtype=np.uint8)
    return {
        "reconstructions": Image.fromarray(noise),  # 1.6 MB as a PNG
        "loss": Image.new("RGB", (1218, 738), (250, 240, 230)),
        "another_one": Image.new("L", (400, 300), 90),
    }


class Page(HTMLParser):
    """Everything of a page that could point outside, its images, numbers and text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.numbers, self.tags, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            if name in attributes:
                self.links.append(attributes[name])
        if tag == "img":
            self.images.append(attributes)
        if tag == "data":
            self.numbers.append(float(attributes["value"]))

    def handle_data(self, data):
        self.text.append(data)


def test_policy_allows_what_the_page_holds_and_nothing_else():
    text = report_html(make_report(), make_pictures(), "digits")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("style-src") == "'unsafe-inline'" and rules.pop("img-src") == "data:"
    assert rules.keys() >= {"default-src", "base-uri", "form-action"} and set(rules.values()) == {"'none'"}
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<img")


HOSTILE = "\x1b[2J\rx\u202ey\nerror: z\udcff"
SHOWN = r"\x1b[2J\rx\u202ey\nerror: z\udcff"


def test_tables_escape_names_that_could_command_a_terminal():
    report = make_report(density=HOSTILE, fine_tuning=TUNED | {"repository": HOSTILE, "revision": HOSTILE})
    report["posterior"]["advice"] = report["model"]["name"] = HOSTILE
    precision = {"images": 1, "blocks": {HOSTILE: 1.0}, "overflow": None, "fp16_psnr": None, "verdict": "safe"}
    differences = {"psnr": {"mean": 1.0, "interval": [0.5, 1.5], "second_is_better": 1.0}}
    figures = FileFigures(
        formats={HOSTILE: 1},
        modes={"L": 1},
        sizes={"8x8": 1},
        sides=(8, 8, 8),
        duplicates=((HOSTILE, "b"),),
        paged=(HOSTILE,),
        leaks=0,
    )
    look = Look(
        parts={"training": 1}, split=False, classes={HOSTILE: 1}, captions=f"bad:\n{HOSTILE}", unreadable=(HOSTILE,),
        left_out=(HOSTILE,), notes=(HOSTILE,), measured=1, mean=(0.5,), std=(0.5,), constant=(HOSTILE,),
        shown=torch.zeros(1, 1, 8, 8), files=figures,
    )  # fmt: skip
    tables = [
        report_table(report | {HOSTILE: 1.5}),
        precision_table(precision | {"advice": HOSTILE}),
        comparison_table({"first": report, "second": report, "differences": differences}),
        look_table(look),
    ]
    for table in tables:
        assert SHOWN in table
        assert all(line.isprintable() for line in table.splitlines()) and "\nerror" not in table


def test_comparison_gives_protocol_units_and_the_sign_of_differences():
    report = make_report()
    differences = {"psnr": {"mean": 1.0, "interval": [0.5, 1.5], "second_is_better": 1.0}}
    differences["rate"] = {"mean": -2.0, "interval": [-3.0, -1.0], "second_is_better": None}
    table = comparison_table({"first": report, "second": report, "differences": differences})
    assert max(map(len, table.splitlines())) <= 110
    text = " ".join(table.split())
    assert "split held-out, at 32x48, 1 channel." in text and "mode, not rounded to 8 bits; float32 on cpu." in text
    assert "Differences are second minus first" in text and f"elbo refer to the {report['density']}" in text
    assert "second - first 95 % interval unit" in text
    assert "[0.5000, 1.5000] dB in 100 % of images" in text and "[-3.0000, -1.0000] nats/image" in text


def test_page_labels_each_scaling_factor_with_what_it_was_measured_on():
    report = make_report()
    report["latents"] |= {"scaling_factor": 1.0125, "shift_factor": 0.25}
    report["model"] |= {"scaling_factor": 1.5, "shift_factor": None}
    text = " ".join("".join(Page(report_html(report, {}, "digits")).text).split())
    assert "On the 1,234 images of this report: scaling_factor 1.0125, shift_factor 0.25." in text
    assert "Pipelines use the values in the model's config.json, which a training run measures on its" in text
    assert ": scaling_factor 1.5, shift_factor none." in text
    assert "scaling factor in config.json 1.5" in " ".join(Page(report_html(report, {}, "digits")).text)


@pytest.mark.slow
def test_page_points_nowhere_outside():
    text = report_html(make_report(), make_pictures(), "digits")
    page = Page(text)
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(|https?://|//\w+\.\w", re.sub(r"base64,[^\"]*", "", text))
    assert "script" not in page.tags and "iframe" not in page.tags
    assert any('rel="icon"' in line and "data:" in line for line in text.splitlines())
    assert '<meta name="viewport" content="width=device-width' in text


@pytest.mark.slow
def test_pictures_are_whole_described_and_small():
    pictures = make_pictures()
    page = Page(report_html(make_report(), pictures, "digits"))
    assert len(page.images) == len(pictures)
    for attributes, (name, picture) in zip(page.images, pictures.items(), strict=True):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", attributes["src"]).groups()
        decoded = Image.open(io.BytesIO(base64.b64decode(data)))
        decoded.load()
        assert decoded.size == picture.size == (int(attributes["width"]), int(attributes["height"]))
        assert attributes["alt"]
        if kind == "png":
            assert np.array_equal(np.asarray(decoded), np.asarray(picture)), name
        assert kind == ("jpeg" if name == "reconstructions" else "png")
        assert len(data) < 1_200_000, name
    assert "Another one" in "".join(page.text)


def test_figures_are_those_of_the_report():
    report = make_report()
    page = Page(report_html(report, {}, "digits"))
    measured = ["loss", "distortion", "rate", "elbo", "bits_per_dim", "psnr", "ssim", "lpips_alex"]
    for value in [*(report[name] for name in measured), *report["intervals"]["psnr"], *report["intervals"]["rate"]]:
        assert value in page.numbers
    text = " ".join("".join(page.text).split())
    assert "rFID" not in text and "LPIPS (vgg)" not in text and "LPIPS (alex)" in text
    for part in ("37.79", "-1,345.3", "[37.50, 38.06]", "1,234 images", "Partly collapsed", "70 of 128", "45 %"):
        assert part in text, part
    for part in (report["posterior"]["advice"], "186,233", "2x8x8", "32x48", "torch 2.15.0, diffusers 0.42.1"):
        assert part in text, part
    assert report["protocol"]["fingerprint"] in text and report["model"]["weights_sha256"] in text
    assert all(number in text for number in ("0.1000", "-0.2000", "1.5000", "0.7500", "100.00", "44.50"))


def test_further_figures_are_shown_under_their_names():
    report = make_report(importance_weighted_bound=1250.5, mean_squared_error=0.25)
    text = "".join(Page(report_html(report, {}, "digits")).text)
    assert "IW bound" in text and "mean squared error" in text
    assert "1,250.5" in report_table(report) and "mean squared error" in report_table(report)


def test_text_of_others_is_escaped():
    hostile = '"><script>alert(1)</script>'
    report = make_report(density=hostile)
    report["posterior"]["advice"] = hostile
    report["protocol"]["data"] = hostile
    page = Page(report_html(report, {hostile: Image.new("L", (8, 8))}, hostile))
    assert "script" not in page.tags and "b" not in page.tags
    assert "".join(page.text).count(hostile) >= 4


@pytest.mark.parametrize("verdict", ["healthy", "partly collapsed", "collapsed", "poor reconstruction", "exploding"])
def test_every_verdict_has_its_colour(verdict):
    report = make_report()
    report["posterior"]["verdict"] = verdict
    (kind,) = re.findall(r'<div class="verdict (\w+)">', report_html(report, {}, "digits"))
    assert kind == {"healthy": "good", "partly collapsed": "fair"}.get(verdict, "bad")


def test_older_reports_have_a_page_too():
    """Without intervals, latents, posterior, model and protocol."""
    report = {name: value for name, value in make_report().items() if not isinstance(value, dict)}
    assert "37.79" in "".join(Page(report_html(report, {}, "digits")).text)
    assert "37.79" in report_table(report)


@pytest.mark.parametrize("fp16_psnr", [71.25, None])
def test_float16_is_shown_where_it_was_tried(fp16_psnr):
    precision = {
        "images": 1234,
        "blocks": {"encoder.conv_in": 2.125, "decoder.up_blocks.2": 131008.0},
        "overflow": "decoder.up_blocks.2",
        "fp16_psnr": fp16_psnr,
        "verdict": "overflows",
        "advice": "Float16 overflows in <b>decoder.up_blocks.2</b>: " + "advice " * 20,
    }
    page = Page(report_html(make_report(fp16=precision), {}, "digits"))
    assert {2.125, 131008.0} <= set(page.numbers) and "b" not in page.tags
    table, text = precision_table(precision), "".join(page.text)
    lines = {line.split("  ")[0]: line.split()[1:] for line in table.splitlines()}
    assert lines["encoder.conv_in"] == ["2.1250", "0.003%"] and lines["decoder.up_blocks.2"] == [
        "131,008.0",
        "200.000%",
    ]
    for shown in (text, table, report_table(make_report(fp16=precision))):
        assert max(map(len, shown.splitlines())) <= 100 or shown is text
        shown = " ".join(shown.split())
        assert precision["advice"].strip() in shown and ("71.25 dB" in shown) == (fp16_psnr is not None)
    assert "1,234 images" in table
    for report in (make_report(fp16=None), make_report()):  # not asked for, and of an older version
        assert "loat16" not in "".join(Page(report_html(report, {}, "digits")).text) + report_table(report)


TUNED = {
    "source": "someone/an-<b>autoencoder</b>",
    "revision": "v1.2",
    "weights_sha256": "ab" * 32,
    "encoder_sha256": "cd" * 32,
    "latents_unchanged": True,
    "differences": {"psnr": [0.5234, 0.49, 0.5512], "ssim": [-0.00123, -0.002, 0.0], "rate": [0.0, 0.0, 0.0]},
    "repository": "someone/an-<b>autoencoder</b>",
}


def test_fine_tuning_is_shown_with_what_it_changed():
    report = make_report(fine_tuning=TUNED)
    page = Page(report_html(report, {}, "digits"))
    table, text = report_table(report), " ".join("".join(page.text).split())
    assert "b" not in page.tags and max(map(len, table.splitlines())) <= 100
    assert "+0.52dB[+0.49, +0.55]" in "".join("".join(page.text).split("\n")).replace("  ", "")
    section = table.partition("in pairs:")[2]
    lines = {line.split("  ")[0]: line.split() for line in section.splitlines()}
    assert lines["PSNR"][1:] == ["+0.52", "[+0.49,", "+0.55]", "dB"]
    assert lines["SSIM"][1:] == ["-0.0012", "[-0.0020,", "+0.0000]"]
    assert "rate" not in lines  # no weight that it depends on has changed
    for shown in (text, " ".join(table.split())):
        assert f"Fine-tuned from {TUNED['source']}, revision v1.2." in shown
        assert "Latents unchanged: existing diffusion models keep working." in shown
        assert f"bit for bit those of {TUNED['source']} (SHA-256 {TUNED['encoder_sha256']})" in shown


@pytest.mark.parametrize("source", ["/home/ann/models/base", "models/base/model", "C:\\Users\\ann\\base"])
def test_local_source_is_shown_without_its_path(source):
    report = make_report(fine_tuning=TUNED | {"source": source, "repository": None, "revision": None})
    for shown in ("".join(Page(report_html(report, {}, "digits")).text), report_table(report)):
        assert "Fine-tuned from base." in shown and "ann" not in shown.replace("channel", "")


def test_trained_encoder_is_no_longer_that_of_its_source():
    report = make_report(fine_tuning=TUNED | {"latents_unchanged": False, "revision": None})
    text = "".join(Page(report_html(report, {}, "digits")).text)
    for shown in (text, report_table(report)):
        shown = " ".join(shown.split())
        assert "Latents changed: the encoder was trained" in shown and "no longer fit" in shown
        assert "unchanged" not in shown and "revision" not in shown


@pytest.mark.parametrize("changes", [{}, {"fine_tuning": None}])
def test_run_from_scratch_has_no_such_section(changes):
    assert "ine-tun" not in report_html(make_report(**changes), {}, "digits") + report_table(make_report(**changes))


def test_settings_do_not_pass_for_figures():
    report = make_report(kl_weight=1e-6, scale=0.71828)
    page, table = Page(report_html(report, {}, "digits")), report_table(report)
    assert not {1e-6, 0.71828} & set(page.numbers)
    for shown in ("".join(page.text), table):
        assert "the loss has kl_weight 1e-06." in " ".join(shown.split()) and "0.7183" not in shown
    assert "has kl_weight" not in report_table(make_report(kl_weight=None))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, ""),
        (100.0, ""),
        (
            2.0,
            "target_rate 2 was not reached: the rate is 104 nats (+5100 %). Train on more images, or start with a lar",
        ),
        (110.0, "(-5 %). Train on more images, or start with a smaller"),
    ],
)
def test_target_rate_that_was_missed_by_more_than_5_percent_is_reported(target, words):
    report = make_report(rate=104.0, target_rate=target)
    page, table = Page(report_html(report, {}, "digits")), report_table(report)
    for shown in ("".join(page.text), table):
        shown = " ".join(shown.split())
        assert words in shown and ("was not reached" in shown) == bool(words)
    assert target not in page.numbers  # a setting, no figure


def test_table_holds_every_figure_in_100_columns():
    report = make_report(density="a density " * 30)
    report["posterior"]["advice"] = "advice " * 60
    table = report_table(report)
    assert max(map(len, table.splitlines())) <= 100
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "37.79" in lines["PSNR"] and "[37.50, 38.06]" in lines["PSNR"] and lines["PSNR"].endswith("dB")
    assert "-1,345.3" in lines["distortion"] and lines["distortion"].endswith("nats/image")
    assert "partly collapsed; 70 of 128 units active" in table and "rFID" not in table


@pytest.fixture(scope="module")
def chromium():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return program


def without_policy(page: str) -> str:
    """A page that may run the scripts of a test."""
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')
    assert policy.search(page)
    return policy.sub("", page)


def browse(program, folder, address, *options):
    """What Chromium prints on opening an address, with a profile that is new."""
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--disable-default-apps", "--disable-extensions", "--virtual-time-budget=5000",
               f"--user-data-dir={folder / 'profile'}", *options, address]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_readable_at(width, chromium, tmp_path):
    """Every picture is there and large enough for its labels; nothing but boxes is scrolled sideways."""
    look = """<script>onload = () => parent.postMessage(JSON.stringify({
        width: innerWidth, needed: document.documentElement.scrollWidth,
        images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]),
        outside: [...document.querySelectorAll("h1,h2,h3,p,td,th,figcaption")].filter(
            e => !e.closest(".box") && e.getBoundingClientRect().right > innerWidth).map(e => e.textContent),
        letters: [...document.querySelectorAll("body *")].map(e => parseFloat(getComputedStyle(e).fontSize))
    }), "*")</script>"""
    pictures = make_pictures()
    page = without_policy(report_html(make_report(), pictures, "digits " + "x" * 90))
    (tmp_path / "page.html").write_text(page + look)
    (tmp_path / "frame.html").write_text(
        f'<body><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
        "<script>onmessage = message => { document.body.dataset.seen = message.data }</script></body>"
    )
    dom = browse(chromium, tmp_path, (tmp_path / "frame.html").as_uri(), "--dump-dom")
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom).group(1)))
    assert seen["width"] == width and seen["needed"] <= width and seen["outside"] == []
    assert [natural for natural, _ in seen["images"]] == [picture.width for picture in pictures.values()]
    assert all(drawn >= 0.6 * natural for natural, drawn in seen["images"])
    assert min(seen["letters"]) >= 14


@pytest.mark.slow
def test_page_asks_no_host_for_anything(chromium, tmp_path):
    def asked(text):
        (tmp_path / "page.html").write_text(text)
        address = (tmp_path / "page.html").as_uri()
        browse(chromium, tmp_path, address, f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom")
        log = json.loads((tmp_path / "net.json").read_text())
        events = [event.get("params", {}) for event in log["events"]]
        # what the browser asks for itself, updates and the like, has no origin
        return {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}

    text = report_html(make_report(), make_pictures(), "digits")
    assert all(url.startswith(("data:", "file:")) for url in asked(text))
    hostile = '<img src="http://127.0.0.1:9/x.png"><script src="http://127.0.0.1:9/x.js"></script>'
    assert "http://127.0.0.1:9/x.png" in asked(without_policy(text) + hostile)  # it would have shown
    assert all(url.startswith(("data:", "file:")) for url in asked(text + hostile))


@pytest.mark.slow
def test_page_runs_no_script_even_one_that_slipped_in(chromium, tmp_path):
    def seen(text):
        (tmp_path / "page.html").write_text(text + "<script>document.body.dataset.ran = 1</script>")
        return "data-ran" in browse(chromium, tmp_path, (tmp_path / "page.html").as_uri(), "--dump-dom")

    text = report_html(make_report(), make_pictures(), "digits")
    assert seen(without_policy(text)) and not seen(text)
