"""The page of a results folder: its content, that it is self-contained, and how a browser renders it."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_up_rows import ablations, cell, environment, growth, resolution, speeds
from PIL import Image, ImageColor

from ablations.analysis import run_summary
from notebooks.lib import plots
from notebooks.report import page as report
from profiling.schema.row import SchemaError, validate

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((result for name in NAMES if (result := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
TOLERANCE = 7
"""Of a colour's channels, of 255: a third of what the nearest two attentions' colours differ by in one of them."""
ITS_OWN = ("update.googleapis.com", "clients2.google.com", "accounts.google.com", "www.google.com")
"""Hosts that Chromium contacts by itself, whatever page it shows."""


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [str(result[attribute]) for name, result in self.tags if name == tag and attribute in result]


def folder(at: Path, rows: list[dict[str, object]]) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    for sweep, part in validate(rows).groupby("sweep"):
        part.to_csv(at / f"{sweep}.csv", index=False)
    (at / "peaks.csv").write_text("what,per_second,unit\nfp32,1e9,FLOP\n")
    return at


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results with all sweeps, and their page."""
    at = folder(
        tmp_path_factory.mktemp("results") / "round-numbers", [*resolution(), *ablations(), *growth(), *speeds()]
    )
    assert report.write(at) == at / "report.html"
    return at


@pytest.fixture(scope="module")
def report_page(device: Path) -> Page:
    return Page((device / "report.html").read_text())


@pytest.mark.slow
def test_page_has_no_external_resources(report_page: Page) -> None:
    assert not {tag for tag, _ in report_page.tags} & {"script", "link", "iframe", "object", "audio", "video", "base"}
    assert all(source.startswith("data:image/webp;base64,") for source in report_page.all("img", "src"))
    assert not re.findall(r"@import|url\(", "".join(report_page.text.split("</style>")[:1]))


def test_every_figure_is_there_and_has_a_text(report_page: Page) -> None:
    texts = report_page.all("img", "alt")
    assert len(texts) == len(report_page.all("img", "src")) == len(set(texts)) == 11
    assert all(len(text) > 10 for text in texts)


def test_pictures_keep_the_colours_that_tell_attentions_apart(tmp_path: Path) -> None:
    colours = [*(colour for colour, _ in plots.STYLES.values()), *dict.fromkeys(colour for colour, _ in plots.OTHERS)]
    fig, ax = plt.subplots(figsize=(13, 6), label="colours")
    for place, colour in enumerate(colours):
        ax.plot([0, 1], [0, place], color=colour, linewidth=0.6, alpha=0.7)
        ax.plot([1], [place], "s", color=colour, markersize=6, markeredgecolor="white")
    image = report._image(fig, tmp_path)
    plt.close(fig)
    (source,) = Page(image).all("img", "src")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(tmp_path / "figures" / "colours.png").convert("RGB")).astype(int)
    for colour in colours:
        wanted = np.array(ImageColor.getrgb(colour))
        marks = (drawn == wanted).all(axis=-1)
        assert marks.any() and abs(shown[marks] - wanted).max() <= TOLERANCE, colour


def test_links_resolve(report_page: Page, device: Path) -> None:
    targets = report_page.all("a", "href")
    anchors = {f"#{name}" for name in report_page.all("section", "id")}
    files = {path.name for path in device.glob("*.csv")} - {"peaks.csv"}
    assert {target for target in targets if target.startswith("#")} == anchors
    assert {target for target in targets if not target.startswith("#")} == files | {"../README.md"}


@pytest.mark.parametrize(
    "sentence",
    [
        "Vision attention on Round Numbers",
        "memory runs out at these tokens per side (interpolated): full near 32.",
        "topk 16 instead of 1 costs 1.0x the MACs, 15.0x the time and 16.0x the memory.",
        "predicted: needs 16.0 GiB, 1.0 GiB are free",
        "killed by signal 11",
        "2026-01-02",
    ],
)
def test_what_the_page_says_follows_from_the_rows(sentence: str, report_page: Page) -> None:
    assert sentence in " ".join(report_page.text.split())


def test_cells_are_counted_by_status(device: Path, report_page: Page) -> None:
    rows = pd.read_csv(device / "resolution.csv")
    counts = [str((rows["status"] == status).sum()) for status in ("ok", "oom", "predicted")]
    line = report_page.text[report_page.text.rindex("resolution.csv") :].split("2026")[0].split()
    assert line == ["resolution.csv", *counts]


def test_the_explorer_is_linked_where_it_is(tmp_path: Path) -> None:
    at = folder(tmp_path / "device", [cell("topk", "bra", "forward", 56, 2**20, 1.0, n_win="7", topk=1)])
    assert "../explorer.html" not in Page(report.write(at).read_text()).all("a", "href")
    (tmp_path / "explorer.html").write_text("")
    assert "../explorer.html" in Page(report.write(at).read_text()).all("a", "href")


@pytest.mark.slow
def test_the_page_is_the_same_every_time(device: Path) -> None:
    before = (device / "report.html").read_bytes()
    report.write(device)
    assert (device / "report.html").read_bytes() == before


def test_page_of_few_results_names_missing_sweeps(tmp_path: Path) -> None:
    rows = [cell("topk", "bra", "forward", 56, 2**20, 1.0, n_win="7", topk=1, device_name="<b>Odd & Co</b>")]
    text = report.write(folder(tmp_path / "little", rows)).read_text()
    said = " ".join(Page(text).text.split())
    assert said.count("python run_all.py --only resolution makes them.") == 1
    assert "No cell failed." in said and "Vision attention on <b>Odd & Co</b>" in said
    assert "<b>" not in text


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "holds no results of a sweep; `python run_all.py` makes results/<device>" in capsys.readouterr().err
    assert report.main([]) == 2 and "usage: python -m notebooks.report" in capsys.readouterr().err
    assert report.main(["--help"]) == 0 and "usage: python -m notebooks.report" in capsys.readouterr().out
    (tmp_path / "topk.csv").write_text("name,ms\nbra,1\n")
    with pytest.raises(SchemaError, match="another schema"):
        report.write(tmp_path)


@pytest.mark.slow
def test_a_run_ends_with_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = folder(tmp_path / "device", [cell("topk", "bra", "forward", 56, 2**20, 1.0, n_win="7", topk=1)])
    run_summary.write_page(at)
    assert capsys.readouterr().out == f"Report: {at / 'report.html'}\n"
    assert Page((at / "report.html").read_text()).all("img", "alt")


def test_without_its_packages_a_run_says_what_the_page_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_summary.write_page(folder(tmp_path / "device", [cell("topk", "bra", "forward", 56, 2**20, 1.0)]))
    message = capsys.readouterr()
    assert message.out == "" and len(message.err.splitlines()) == 1
    assert re.match(r"No report.html: .*matplotlib.*; it needs pip install '.\[notebooks\]'", message.err)


@pytest.mark.slow
def test_the_page_needs_no_pytorch(device: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "notebooks.report", str(device)]
    done = subprocess.run(command, cwd=ROOT, env=environment(device.parent, tmp_path) | {"MPLBACKEND": "agg"})
    assert done.returncode == 0


def browse(page: Path, picture: Path) -> tuple[list[str], set[str]]:
    """Show a page in Chromium without a network; returns its console output and the requested addresses."""
    log, profile = picture.with_suffix(".json"), picture.with_suffix(".profile")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr",
        f"--log-net-log={log}", f"--screenshot={picture}", "--window-size=1200,3000", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = {str(event.get("params", {}).get("url", "")) for event in events}
    own = re.compile(rf"https?://({'|'.join(map(re.escape, ITS_OWN))})/")
    return console, {url for url in asked if url.startswith("http") and not own.match(url)}


@needs_chromium
def test_a_browser_shows_the_page(device: Path, tmp_path: Path) -> None:
    console, asked = browse(device / "report.html", tmp_path / "page.png")
    assert (console, asked) == ([], set())
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1200, 3000)
        # Every third of it has content: text, lines and marks of many colours on white.
        for top in (0, 1000, 2000):
            colours = picture.convert("RGB").crop((0, top, 1200, top + 1000)).getcolors(1_200_000)
            white = dict(map(reversed, colours)).get((255, 255, 255), 0)
            assert len(colours) > 50 and 0.3 < white / 1_200_000 < 0.99


@needs_chromium
def test_browser_check_detects_errors_and_requests(tmp_path: Path) -> None:
    bad = "<img src='http://outside.invalid/a.png'><script>console.error('it broke')</script>"
    (tmp_path / "bad.html").write_text(bad)
    console, asked = browse(tmp_path / "bad.html", tmp_path / "bad.png")
    assert "it broke" in console[0] and asked == {"http://outside.invalid/a.png"}
