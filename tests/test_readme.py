"""The pages are correct: links resolve, examples run, tables and numbers match the results."""

import json
import re
from pathlib import Path

import pytest
import torch

from ablations.analysis import readme_table
from ablations.cli.run_all import EXAMPLES as RUN_ALL
from ablations.cli.run_all import _parse as parse_run_all
from attention_zoo import InvalidOption, build, get, load_plugin, names, options
from attention_zoo.core.base import FAMILIES
from notebooks.lib.limits import crossing
from notebooks.tables import speed
from profiling.__main__ import EXAMPLES as PROFILING
from profiling.__main__ import _parser
from profiling.schema.replicates import aggregate_replicates
from profiling.schema.row import load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "profiling/README.md",
    "results/README.md",
    "ablations/slurm/README.md",
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
    assert readme_table.markdown(ROOT / "results") in README, "mend it with: python -m ablations table README.md"


def test_the_table_of_publications_is_fresh() -> None:
    page = (ROOT / "attention_zoo/attentions/README.md").read_text()
    command = "python -m ablations table attention_zoo/attentions/README.md"
    assert readme_table.publications() in page, f"mend it with: {command}"


def test_table_lists_every_attention() -> None:
    shown = readme_table.markdown(ROOT / "results").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown if "| `" in line]
    assert {row[1].split("`")[1] for row in cells} == set(names())
    families = [row[0] for row in cells]
    assert families == sorted(families, key=FAMILIES.index) and "other" not in families
    for family, name, attends_to, impls, power, macs, memory, learns, source in cells:
        registered = get(name.split("`")[1])
        assert family == registered.family
        assert attends_to == registered.attends_to and 0 < len(attends_to) <= 60, name
        assert impls == ", ".join(registered.impls)
        assert power.startswith(("HW", "(HW)^")) and macs.endswith((" M", " G")) and memory.endswith("iB")
        assert re.fullmatch(r"((\d+|-)( / (\d+|-)){3})?", learns), name
        assert re.search(r"\b\d{4}$", source) and source.split(",")[0] in registered.citation and len(source) <= 60
    assert [row[4] for row in cells if row[1].startswith("`bra`")] == ["(HW)^2", "(HW)^4/3"]


def test_the_numbers_of_the_table_are_in_the_results() -> None:
    rows = load(ROOT / "results/amd-epyc-family-26-model-2-2-threads/complexity.csv")
    full = rows[
        (rows["name"] == "full") & (rows["mode"] == "forward_backward") & (rows["height"] == readme_table.GRID)
    ].iloc[0]
    line = next(line for line in README.splitlines() if "| `full`" in line)
    assert f"| {full['macs_counted'] / 1e9:.0f} G | {full['memory_predicted_bytes'] / 2**30:.1f} GiB |" in line


def test_the_table_is_put_between_its_comments_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    assert readme_table.rewrite(page, ROOT / "results") and not readme_table.rewrite(page, ROOT / "results")
    text = page.read_text()
    assert text.startswith(f"before\n{readme_table.BEGIN}\n\n| family |") and text.endswith(
        f"\n{readme_table.END}\nafter\n"
    )
    assert "old" not in text
    page.write_text("no table here\n")
    with pytest.raises(InvalidOption, match="no place for the table"):
        readme_table.rewrite(page, ROOT / "results")
    assert page.read_text() == "no table here\n"
    with pytest.raises(InvalidOption, match=r"python run_all\.py --only complexity"):
        readme_table.markdown(tmp_path)


def test_the_finding_is_in_the_results() -> None:
    rows = aggregate_replicates(load(ROOT / "results/amd-epyc-family-26-model-2-2-threads/resolution.csv"))
    steps = rows[rows["mode"] == "forward_backward"].set_index("height").sort_index()
    message = " ".join(README.split())
    for name, words in (("full", "with full attention"), ("bra", "with BRA as published")):
        curve = steps.loc[steps["name"] == name, "memory_predicted_bytes"].astype(float)
        side = crossing(curve, 24 * 2**30).side
        stated = re.search(rf"near (\d+) x \1 (?:tokens )?{words}", message)
        assert stated and side == pytest.approx(int(stated[1]), rel=0.03)
    assert "windows still fit at 1024 x 1024" in message
    assert (steps.loc[steps["name"] == "window", "memory_predicted_bytes"].loc[1024] < 24 * 2**30).all()
    timed = rows[rows["status"] == "ok"]
    assert "within 0.01 % of the peak measured there" in message
    assert ((timed["memory_predicted_bytes"] / timed["memory_peak_bytes"] - 1).abs() < 1e-4).all()


def test_the_speed_of_bra_on_a_cpu_is_in_the_results() -> None:
    message = " ".join(README.split())
    means = re.search(r"EPYC in fp32, `sdpa` is (\S+)x as fast as the published method forward and (\S+)x", message)
    memory = re.search(r"with 1/(\S+) and 1/(\S+) of its memory", message)
    assert means and memory
    rows = aggregate_replicates(load(ROOT / "results/amd-epyc-family-26-model-2-2-threads/bra_speed.csv"))
    for column, stated in ((speed.TIME, means), (speed.MEMORY, memory)):
        for mode, words in zip(("forward", "forward_backward"), stated.groups(), strict=True):
            eight = speed.of_the_eight(speed.ratios(speed.wide(rows[rows["mode"] == mode], column)))["sdpa"]
            assert len(eight) == 8 and eight.min() > 1
            assert speed.geometric_mean(eight) == pytest.approx(float(words), rel=0.025)


def test_the_speed_of_bra_on_a_gpu_is_in_the_results() -> None:
    stated = re.search(
        r"kernels are (\S+)x to (\S+)x as fast forward and (\S+)x to (\S+)x in training", " ".join(README.split())
    )
    assert stated
    rows = load(ROOT / "results/nvidia-h100-80gb-hbm3/bra_speed.csv")
    result = []
    for mode in ("forward", "forward_backward"):
        ratios = speed.ratios(speed.wide(rows[(rows["mode"] == mode) & (rows["dtype"] == "bf16")], speed.DEVICE_TIME))
        eight = ratios.xs(1, level="batch").dropna(subset="triton" + speed.GRAPH)
        triton, pregathered = (eight[name + speed.GRAPH] for name in ("triton", "pre-gathered"))
        assert len(triton) == 8 and (triton > pregathered).all()
        result += [triton.min(), triton.max()]
    assert [f"{ratio:.1f}" for ratio in result] == list(stated.groups())


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
