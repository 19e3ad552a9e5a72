"""What the pages say is true: links resolve, examples run, every attention has its line."""

import re
from pathlib import Path

import pytest

from attention_zoo import names
from profiling.__main__ import EXAMPLES as PROFILING
from profiling.__main__ import _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md", "ablations/CAMPAIGN.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"(?<!\")\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_every_attention_has_a_line_in_the_table() -> None:
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == set(names())


def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] == str(64 * 64 * 9 * 54 * 54)


@pytest.mark.parametrize("page", ["README.md", "help"])
def test_profiling_commands_parse(page: str) -> None:
    text = PROFILING if page == "help" else (ROOT / page).read_text()
    commands = re.findall(r"python -m profiling (--.*)", text)
    assert len(commands) >= 3
    for command in commands:
        arguments = command.split("  ")[0].split()
        if "--help" not in arguments:
            _parser(arguments)[0].parse_args(arguments)
