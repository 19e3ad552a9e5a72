"""What the pages say is true: links resolve, examples run, tables and numbers are those of the results."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ablations import table
from ablations.command import EXAMPLES as RUN_ALL
from ablations.command import _parse as parse_run_all
from attention_zoo import InvalidOption, build, get, load_plugin, names, options
from notebooks import speed
from notebooks.limits import crossing
from profiling.__main__ import EXAMPLES as PROFILING
from profiling.__main__ import _parser
from profiling.replicates import typical
from profiling.rows import load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "ablations/CAMPAIGN.md",
    *(f"notebooks/{p.name}" for p in ROOT.glob("notebooks/*.ipynb")),
]


def prose(page: str) -> str:
    """A page's Markdown; of a notebook, that of its Markdown cells."""
    text = (ROOT / page).read_text()
    if not page.endswith(".ipynb"):
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(page: str) -> None:
    text = re.sub(r"```.*?```", "", prose(page), flags=re.DOTALL)
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"(?<!\")\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(path).exists(), target
        assert path or anchor in anchors, target


def test_there_are_links_to_check() -> None:
    assert "](results/README.md)" in README and "](CONTRIBUTING.md)" in README and ".ipynb)" in README


def test_the_table_of_attentions_is_fresh() -> None:
    assert table.markdown(ROOT / "results") in README, "mend it with: python -m ablations table README.md"


def test_the_table_tells_of_every_attention() -> None:
    shown = table.markdown(ROOT / "results").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown if line.startswith("| `")]
    assert {row[0].split("`")[1] for row in cells} == set(names())
    for name, attends_to, impls, power, macs, memory, source in cells:
        registered = get(name.split("`")[1])
        assert attends_to == registered.attends_to and 0 < len(attends_to) <= 60, name
        assert impls == ", ".join(registered.impls)
        assert power.startswith(("HW", "(HW)^")) and macs.endswith((" M", " G")) and memory.endswith("iB")
        assert re.search(r"\b\d{4}$", source) and source.split(",")[0] in registered.citation and len(source) <= 60
    assert [row[3] for row in cells if row[0].startswith("`bra`")] == ["(HW)^2", "(HW)^4/3"]


def test_the_numbers_of_the_table_are_in_the_results() -> None:
    rows = load(ROOT / "results/intel-xeon-2-threads/complexity.csv")
    full = rows[(rows["name"] == "full") & (rows["mode"] == "forward_backward") & (rows["height"] == table.GRID)].iloc[
        0
    ]
    line = next(line for line in README.splitlines() if line.startswith("| `full`"))
    assert f"| {full['macs_counted'] / 1e9:.0f} G | {full['memory_predicted_bytes'] / 2**30:.1f} GiB |" in line


def test_the_table_is_put_between_its_comments_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.rewrite(page, ROOT / "results") and not table.rewrite(page, ROOT / "results")
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n\n| name |") and text.endswith(f"\n{table.END}\nafter\n")
    assert "old" not in text
    page.write_text("no table here\n")
    with pytest.raises(InvalidOption, match="no place for the table"):
        table.rewrite(page, ROOT / "results")
    assert page.read_text() == "no table here\n"
    with pytest.raises(InvalidOption, match=r"python run_all\.py --only complexity"):
        table.markdown(tmp_path)


def test_the_finding_is_in_the_results() -> None:
    rows = typical(load(ROOT / "results/intel-xeon-2-threads/resolution.csv"))
    steps = rows[rows["mode"] == "forward_backward"].set_index("height").sort_index()
    told = " ".join(README.split())
    for name, words in (("full", "with full attention"), ("bra", "with BRA as published")):
        curve = steps.loc[steps["name"] == name, "memory_predicted_bytes"].astype(float)
        side = crossing(curve, 24 * 2**30).side
        stated = re.search(rf"near (\d+) x \1 (?:tokens )?{words}", told)
        assert stated and side == pytest.approx(int(stated[1]), rel=0.03)
    assert "windows still fit at 1024 x 1024" in told
    assert (steps.loc[steps["name"] == "window", "memory_predicted_bytes"].loc[1024] < 24 * 2**30).all()
    timed = rows[rows["status"] == "ok"]
    assert "within 0.01 % of the peak measured there" in told
    assert ((timed["memory_predicted_bytes"] / timed["memory_peak_bytes"] - 1).abs() < 1e-4).all()


def test_the_speed_of_bra_is_in_the_results() -> None:
    told = " ".join(README.split())
    means = re.search(r"(\S+)x as fast as the published method forward and (\S+)x in training on .* AMD EPYC", told)
    memory = re.search(r"with 1/(\S+) and 1/(\S+) of its memory, and slower at none", told)
    older = re.search(r"an earlier version of it was (\S+)x and (\S+)x as fast on an Intel", told)
    assert means and memory and older
    for folder, column, stated in (
        ("amd-epyc", speed.TIME, means), ("amd-epyc", speed.MEMORY, memory), ("intel-xeon", speed.TIME, older),
    ):  # fmt: skip
        rows = typical(load(ROOT / f"results/{folder}-2-threads/bra_speed.csv"))
        for mode, words in zip(("forward", "forward_backward"), stated.groups(), strict=True):
            eight = speed.of_the_eight(speed.ratios(speed.wide(rows[rows["mode"] == mode], column)))["sdpa"]
            assert len(eight) == 8 and eight.min() > 1
            assert speed.geometric_mean(eight) == pytest.approx(float(words), rel=0.025)


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_examples_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert shown.split()[0] == str(64 * 64 * 9 * 54 * 54)
    assert "latency_p50_ms" in shown and "pseudo_conv" in shown


def test_your_own_attention_takes_part_as_the_readme_says(tmp_path: Path) -> None:
    (example,) = (example for example in EXAMPLES if "@register" in example)
    plugin = tmp_path / "my_attention.py"
    plugin.write_text(example)
    assert load_plugin(plugin) == ["my_attention"] and list(options("my_attention")) == ["reach"]
    module = build("my_attention", dim=8, num_heads=2, reach=5)
    assert module(torch.zeros(1, 6, 7, 8)).shape == (1, 6, 7, 8)
    words = ["--plugin", str(plugin), "--attention", "my_attention", "--reach", "5"]
    assert _parser(words)[0].parse_args(words).reach == 5


@pytest.mark.parametrize("page", ["README.md", "help"])
def test_profiling_commands_parse(page: str) -> None:
    text = (PROFILING if page == "help" else README).replace("\\\n", "")
    commands = re.findall(r"python -m profiling (--.*)", text)
    assert len(commands) >= 3
    for command in commands:
        arguments = re.split(r"   +(?!-)", command)[0].split()
        if "--help" not in arguments:
            _parser(arguments)[0].parse_args(arguments)


@pytest.mark.parametrize("page", ["README.md", "help"])
def test_run_all_commands_parse(page: str) -> None:
    commands = re.findall(r"python run_all.py( +--[^`\n]*)", RUN_ALL if page == "help" else README)
    assert len(commands) >= 3
    for command in commands:
        parse_run_all(command.strip().split("  ")[0].split())


def test_the_recommendation_is_what_the_command_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for memory, of which the scratch of kernels differs a little from machine to machine."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    (block,) = re.findall(r"```\n\$ python -m ablations (recommend .*?)```", README, re.DOTALL)
    command, shown = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
    # As a user would run it: the interpreter of the tests would let Triton's kernels run on a CPU.
    words, plain = (
        shlex.split(command.replace("\\\n", " ")),
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    done = subprocess.run([sys.executable, "-m", "ablations", *words], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    told = [line.rstrip() for line in done.stdout.strip().splitlines()]
    memory = re.compile(r"([\d.,]+) ([KMGT]iB)")
    mended = f"paste the output of: python -m ablations {command}"
    assert [memory.sub("_", line).split() for line in told] == [
        memory.sub("_", line).split() for line in shown.strip().splitlines()
    ], mended
    for here, there in zip(memory.findall("\n".join(told)), memory.findall(shown), strict=True):
        assert here[1] == there[1] and float(here[0]) == pytest.approx(float(there[0]), rel=0.1), mended
