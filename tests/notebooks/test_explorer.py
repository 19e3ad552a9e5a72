"""The explorer: what it is made from, and what it does in a real browser without a network."""

import csv
import importlib.util
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_rows import ablations, cell, resolution
from test_report import folder

from ablations.analysis import run_summary
from notebooks.explorer import page as explorer
from notebooks.explorer.colours import on_dark
from notebooks.explorer.configurations import usual_options
from profiling.__main__ import parse
from profiling.schema.row import validate

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("vl_convert", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if found is None]
needs_library = pytest.mark.skipif("vl_convert" in MISSING, reason="vl-convert-python is not installed")

WINDOW, FULL = [[64, 1, 1]], [[4, 2, 2]]
"""64 bytes times tokens and channels; 4 times the square of tokens, and heads."""
SETTINGS = ("cpu fp32 forward", "cpu fp32 forward_backward", "cuda bf16 forward")


def entry(attention: str, form: Any, impl: str = "reference", **options: Any) -> dict[str, Any]:
    return {
        "name": attention, "options": options, "impl": impl, "rounding": [1, 1, 0],
        "memory": {setting: [[form], [], [], []] for setting in SETTINGS},
        "macs": {"forward": form, "forward_backward": form}, "error": {"macs": 0.001, SETTINGS[0]: 0.013},
    }  # fmt: skip


PREDICTIONS = {
    "cpu": "AVX2", "sides": [14, 1024], "dims": [16, 512], "head_dims": [16, 32],
    "spatial": ["1", "HW", "HHWW"], "channel": ["1", "d", "h"],
    "configurations": [
        entry("window", WINDOW), entry("window", WINDOW, "sdpa", window_size=14), entry("full", FULL),
        entry("bra", WINDOW, auto_pad=True, side_dwconv=5),
        entry("bra", WINDOW, auto_pad=True, side_dwconv=5, n_win="auto"),
        {"name": "axial", "impl": "sdpa", "options": {}, "failed": "no form"},
    ],
}  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    usual = {"n_win": "7", "topk": 4, "side_dwconv": 5, "auto_pad": True, "soft_routing": False}
    for side, ms in ((28, 1.0), (56, 4.0), (112, 16.0)):
        yield cell("resolution", "window", "forward", side, 4096 * side**2, ms, window_size=7)
        yield cell("resolution", "full", "forward", side, 8 * side**4, 4 * ms)
        yield cell("resolution", "bra", "forward", side, 5000 * side**2, 2 * ms, **usual)
    oom = {"status": "oom", "reason": "predicted: needs 32.0 GiB, <1> GiB is free"}
    yield cell("resolution", "full", "forward", 256, 8 * 256**4, None, **oom)
    # A row of BRA holds all its options.
    yield from ({**usual, **row} if row["name"] == "bra" else row for row in ablations())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two devices with predictions, and their page."""
    root = tmp_path_factory.mktemp("results")
    folder(root / "first", list(rows()))
    folder(root / "second", [row | {"device_name": "Second"} for row in rows() if row["sweep"] == "resolution"])
    (root / "predictions.json").write_text(json.dumps(PREDICTIONS))
    if "vl_convert" not in MISSING:
        assert explorer.write([root]) == root / "explorer.html"
    return root


def by_title(shown: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(one["name"], one["label"], one["impl"]): one for one in shown["configurations"]}


def test_rows_and_predictions_of_one_configuration_meet(results: Path) -> None:
    known = by_title(explorer.data([results]))
    assert known["window", "", "reference"]["prediction"] == 0
    # The command names only what differs from the defaults; auto_pad stands apart.
    bra = known["bra", "", "reference"]
    assert bra["prediction"] == 3 and bra["options"] == (("side_dwconv", "5"),) and bra["padded"]
    assert known["window", "window_size 14", "sdpa"]["prediction"] == 1
    assert known["bra", "n_win auto", "reference"]["prediction"] == 4
    assert not any(one["usual"] and one["label"] for one in known.values())


def test_numbers_are_those_of_the_rows(results: Path) -> None:
    shown = explorer.data([results])
    assert [device["name"] for device in shown["devices"]] == ["Round Numbers", "Second"]
    columns, known = shown["rows"], shown["configurations"]
    # Models are of the report.
    assert len(columns["device"]) == 2 * 10 + 9
    names = [known[place]["name"] for place in columns["configuration"]]
    row = next(number for number, name in enumerate(names) if name == "full" and columns["ms"][number] == 16)
    assert (columns["height"][row], columns["peak"][row], columns["low"][row]) == (56, 8 * 56**4, 14.4)
    assert columns["status"]["values"][columns["status"]["codes"][row]] == "ok"


def test_without_predictions_the_rows_alone_are_shown(tmp_path: Path) -> None:
    folder(tmp_path / "device", list(resolution()))
    shown = explorer.data([tmp_path])
    assert shown["predictions"] is None and {one["prediction"] for one in shown["configurations"]} == {None}
    if "vl_convert" not in MISSING:
        assert "python -m ablations lattice" in explorer.write([tmp_path]).read_text()


def test_predictions_of_another_form_are_left_out(results: Path, tmp_path: Path) -> None:
    folder(tmp_path / "device", list(resolution()))
    (tmp_path / "predictions.json").write_text('{"lattice": []}')
    shown = explorer.data([tmp_path])
    assert shown["predictions"] is None and "of another form" in shown["leftOut"][0]


def test_two_runs_of_one_device_have_two_names(results: Path) -> None:
    names = [device["name"] for device in explorer.data([results, results])["devices"]]
    assert len(names) == len(set(names)) == 4


def test_accuracy_is_taken_where_it_was_measured(tmp_path: Path) -> None:
    at = folder(tmp_path / "device", list(resolution()))
    assert explorer.data([tmp_path])["capability"] == []
    with (ROOT / "results/amd-epyc-family-26-model-2-2-threads/capability.csv").open() as file:
        header, first = next(file), next(row for row in file if ",full,,,,offset,medium," in row)
    accuracy = next(csv.DictReader([header, first]))["accuracy"]
    other = first.replace(",cpu,0,", ",cpu,1,").replace(f",{accuracy},", ",0.5,")
    hard, variant = first.replace(",medium,", ",hard,"), first.replace(",full,,", ",full,qkv_bias=False,")
    assert len({first, other, hard, variant}) == 4
    (at / "capability.csv").write_text("".join([header, first, other, hard, variant]))
    assert explorer.data([tmp_path])["capability"] == [
        {
            "device": 0,
            "attention": "full",
            "task": "offset",
            "accuracy": pytest.approx((0.999500749 + 0.5) / 2, abs=1e-5),
        }
    ]


def test_dark_theme_keeps_hues_that_are_seen_and_lightens_the_others() -> None:
    assert on_dark("#E69F00") == "#E69F00" and on_dark("#000000") > "#404040"


def test_input_that_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explorer.main([str(tmp_path)]) == 2
    assert "holds no results of any device; `python run_all.py` makes them" in capsys.readouterr().err
    assert explorer.main(["--no"]) == 2 and "usage: python -m notebooks.explorer" in capsys.readouterr().err
    assert explorer.main(["--help"]) == 0 and "usage: python -m notebooks.explorer" in capsys.readouterr().out


def test_without_its_library_a_run_says_what_the_page_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vl_convert'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder(tmp_path / "results" / "device", list(resolution()))
    run_summary.write_explorer(tmp_path / "results")
    message = capsys.readouterr()
    assert message.out == "" and len(message.err.splitlines()) == 1
    assert message.err.startswith("No explorer.html: ") and "it needs pip install '.[explorer]'" in message.err


@needs_library
def test_the_page_is_small_and_asks_for_nothing(results: Path) -> None:
    text = (results / "explorer.html").read_text()
    assert len(text.encode()) < 6e6
    assert "default-src 'none'" in text and 'src="http' not in text
    # What a row says is text.
    assert "<1> GiB" not in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if MISSING:
        pytest.skip(f"missing here: {', '.join(MISSING)}")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1400,1000", "disable-background-networking",
                 "host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Opened:
    """The page in a browser."""

    def __init__(self, driver: Any, results: Path) -> None:
        self.driver, self.address = driver, (results / "explorer.html").as_uri()

    def open(self, state: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#{state}")
        self.until("return document.documentElement.dataset.drawn")

    def until(self, script: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20, 0.05).until(lambda driver: driver.execute_script(script))

    def until_absent(self, name: str) -> None:
        """Until no row of the table begins with this name: the table is drawn after the state has changed."""
        rows = "[...document.querySelectorAll('#ranked tbody tr')]"
        self.until(f"return !{rows}.some((row) => row.children[1].textContent.startsWith('{name}'))")

    def slide(self, name: str, position: int) -> None:
        self.driver.execute_script(
            "const slider = document.getElementById(arguments[0] + '-slider'); slider.value = arguments[1];"
            "slider.dispatchEvent(new Event('input', { bubbles: true }))", name, position,
        )  # fmt: skip
        self.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 30))")

    def table(self) -> list[list[str]]:
        script = (
            "return [...document.querySelectorAll('#ranked tbody tr')].map((row) => "
            "[...row.children].map((cell) => cell.textContent))"
        )
        return self.driver.execute_script(script)  # type: ignore[no-any-return]

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))

    def errors(self) -> list[str]:
        return [line["message"] for line in self.driver.get_log("browser")]


@pytest.fixture
def opened(browser: Any, results: Path) -> Opened:
    return Opened(browser, results)


@pytest.mark.browser
@pytest.mark.parametrize("view", ["memory", "macs", "latency", "pareto", "bra", "speed", "compare"])
def test_every_view_opens_from_a_file_without_a_message(opened: Opened, view: str) -> None:
    opened.open(f"view={view}&latency=30")
    assert opened.errors() == []
    drawn = opened.driver.execute_script("return document.querySelectorAll('#charts svg path').length")
    # bra_speed was not measured here, and the page says how it would be.
    assert drawn > 5 if view != "speed" else "--only bra_speed" in opened.text("#charts")


@pytest.mark.browser
def test_the_first_are_those_that_fit_and_are_fastest(opened: Opened) -> None:
    opened.open()
    first, second, third = opened.table()
    assert [row[1].split()[0] for row in (first, second, third)] == ["bra", "window", "full"]
    assert "topk 1" in first[1] and first[2].startswith("2 ms") and second[2].startswith("4 ms")
    assert first[0] == "fits" and "measured" in first[2]
    assert "counted" in first[4] and "measured" in first[3]
    assert "Fastest known: bra, topk 1, 2 ms (measured)" in opened.text("#summary")


@pytest.mark.browser
def test_a_slider_changes_the_table_and_the_source_of_its_numbers(opened: Opened) -> None:
    opened.open()
    before = opened.table()
    opened.slide("height", 500)
    after = opened.table()
    height = opened.driver.execute_script("return state.height")
    assert after != before and 56 < height < 256
    window = next(row for row in after if row[1].startswith("window"))
    assert "interpolated" in window[2] or "none" in window[2] or "not measured" in window[2]
    assert "predicted" in window[3]
    # 64 bytes per token and channel, by the form of this test.
    assert opened.driver.execute_script("return costs(0, state).memory.value") == 64 * height * height * 64
    opened.slide("memory", 0)
    assert all(row[0] == "memory" for row in opened.table())
    assert opened.errors() == []


@pytest.mark.browser
def test_the_hash_restores_a_state(opened: Opened) -> None:
    opened.open(
        "view=latency&height=96&width=160&dim=96&heads=3&mode=forward_backward&memory=256&off=local&all=1&theme=dark"
    )
    state = opened.driver.execute_script("return { ...state }")
    assert (state["height"], state["width"], state["dim"], state["heads"]) == (96, 160, 96, 3)
    assert not state["square"] and state["mode"] == "forward_backward" and state["memory"] == 256
    opened.until_absent("window")
    assert opened.driver.execute_script("return document.documentElement.dataset.theme") == "dark"
    opened.slide("dim", 900)
    opened.until(f"return location.hash.includes('dim=') && !location.hash.includes('dim={state['dim']}&')")
    address, expected = opened.driver.current_url, opened.table()
    opened.open(address.split("#")[1])
    assert opened.table() == expected


@pytest.mark.browser
def test_a_number_that_is_not_valid_changes_nothing(opened: Opened) -> None:
    opened.open("height=-5&width=abc&view=nothing&memory=0&device=9")
    assert opened.driver.execute_script("return [state.height, state.width, state.view, state.memory]") == [
        56, 56, "memory", 1024,
    ]  # fmt: skip
    assert opened.errors() == []


@pytest.mark.browser
def test_the_pinned_command_measures_the_pinned_configuration(opened: Opened) -> None:
    from selenium.webdriver.common.keys import Keys

    opened.open("height=96&width=160&dim=96&heads=3&mode=forward_backward&all=1")
    seen = set()
    for number in range(len(opened.table())):
        button = opened.driver.find_elements("css selector", "#ranked tbody button")[number]
        button.send_keys(Keys.ENTER)
        opened.until("return !document.getElementById('pin').hidden")
        job = parse(opened.text("#command").removeprefix("python -m profiling ").split())
        case, options = job.case, dict(job.case.options)
        assert (case.height, case.width, case.dim, case.num_heads) == (96, 160, 96, 3)
        assert (case.mode, case.dtype, case.device, case.batch) == ("forward_backward", "fp32", "cpu", 1)
        seen.add((case.name, case.impl, str(options.get("n_win", options.get("window_size"))), options.get("auto_pad")))
        opened.driver.find_element("id", "unpin").click()
        opened.until("return document.getElementById('pin').hidden")
    assert {("window", "reference", "None", None), ("window", "sdpa", "14", None), ("bra", "reference", "auto", True),
            ("full", "reference", "None", None)} <= seen  # fmt: skip


@pytest.mark.browser
@pytest.mark.parametrize("shape", ["", "height=112&width=56"])
def test_predicted_lines_reach_the_end_of_the_range_and_have_names_there(opened: Opened, shape: str) -> None:
    opened.open(shape)
    assert max(opened.driver.execute_script("return sampledShapes(state).map((one) => one.height)")) == 1024 // 28 * 28
    labels = opened.driver.execute_script("return drawn.charts[0].result.view.data('labels').map((one) => one.name)")
    assert {"full", "window"} <= {*labels}


@pytest.mark.browser
def test_failed_cells_have_their_reason_in_a_table(opened: Opened) -> None:
    opened.open()
    assert "needs 32.0 GiB, <1> GiB is free" in opened.text("#failures tbody")


@pytest.mark.browser
def test_controls_have_names_and_states(opened: Opened) -> None:
    opened.open()
    unnamed = opened.driver.execute_script(
        "return [...document.querySelectorAll('input, select, button')].filter((e) => "
        "!(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()).map((e) => e.id)"
    )
    assert unnamed == []
    sorts = "return [...document.querySelectorAll('#ranked thead th')].map((h) => h.getAttribute('aria-sort'))"
    assert opened.driver.execute_script(sorts) == ["ascending", "none", "none", "none", "none"]
    opened.driver.find_elements("css selector", "#ranked thead button")[3].click()
    # The table is drawn after the state has changed.
    opened.until(f"{sorts}[3] === 'ascending'")
    opened.driver.find_element("css selector", "#legend button[data-family=local]").click()
    opened.until("return document.querySelector('#legend [data-family=local]').ariaPressed === 'false'")
    opened.until_absent("window")


@pytest.mark.browser
def test_the_browser_evaluates_forms_as_the_suite_does(browser: Any, tmp_path: Path) -> None:
    from ablations.analysis import lattice

    shutil.copy(ROOT / "results" / "predictions.json", tmp_path)
    folder(tmp_path / "device", list(rows()))
    explorer.write([tmp_path])
    opened = Opened(browser, tmp_path)
    opened.open()
    entries = [entry for entry in json.loads((tmp_path / "predictions.json").read_text())["configurations"]
               if "failed" not in entry]  # fmt: skip
    draw = random.Random(3)
    for number, entry in enumerate(entries):
        shape = lattice.random_shape(draw)
        at = {"height": shape.height, "width": shape.width, "dim": shape.dim, "heads": shape.heads}
        script = (
            "const one = DATA.predictions.candidates[arguments[0]];"
            "return evaluateForm(one.memory[arguments[1]], arguments[2])"
        )
        for word in entry["memory"]:
            shown = opened.driver.execute_script(script, number, word, at)
            assert shown == pytest.approx(lattice.memory(entry, word, shape), rel=1e-12)
    assert opened.driver.execute_script(script, 0, next(iter(entries[0]["memory"])), at | {"heads": 7}) is None


def test_usual_options_are_those_of_the_device_measured_last() -> None:
    rows = [cell("resolution", "deformable", "forward", side, 1, 1.0, relative_position_bias=False, device_name="Old")
            for side in (8, 16)]  # fmt: skip
    newer = {"relative_position_bias": True, "device_name": "New", "started_at": "2026-02-02T00:00:00+00:00"}
    rows.append(cell("resolution", "deformable", "forward", 8, 1, 1.0, **newer))
    assert usual_options(validate(rows))["deformable"] == {"relative_position_bias": "true"}
