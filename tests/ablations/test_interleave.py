"""Two variants in turn: verdicts on samples that are known, and the whole path once on a small cell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations.__main__ import main
from ablations.analysis import interleave
from ablations.analysis.interleave import Blocks, evaluate
from ablations.analysis.interleave_process import side
from attention_zoo import InvalidOption

PLUGIN = """
from torch import nn
from attention_zoo import register

@register("interleaved")
class Interleaved(nn.Module):
    def __init__(self, dim, num_heads, *, times: int = 1):
        super().__init__()
        self.mix, self.times = nn.Linear(dim, dim), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.mix(x)
        return x
"""


def pairs(ratio: float, seed: int, processes: int = 6, noise: float = 0.01) -> list[Blocks]:
    """Blocks of pairs of processes with a slow drift that both sides share, and noise that they do not."""
    rng = np.random.default_rng(seed)
    result: list[Blocks] = []
    for _ in range(processes):
        moment, layout = rng.uniform(0.7, 1.5), rng.normal(1, noise, 2)
        drift = moment * np.exp(np.cumsum(rng.normal(0, 0.02, 20)))
        times = [drift * at * rng.normal(1, noise, 20) for at in (layout[0], ratio * layout[1])]
        result.append(list(zip(5 * times[0], 5 * times[1], strict=True)))
    return result


@pytest.mark.parametrize(("ratio", "verdict"), [(1.1, "SLOWER"), (0.9, "FASTER"), (1.0, "SAME")])
def test_a_tenth_is_detected_and_no_change_is_called_so(ratio: float, verdict: str) -> None:
    verdicts = [evaluate(pairs(ratio, seed)).verdict for seed in range(20)]
    assert verdicts.count(verdict) >= 19, verdicts
    assert not {"SLOWER": {"FASTER", "SAME"}, "FASTER": {"SLOWER", "SAME"}, "SAME": set()}[verdict] & set(verdicts)


def test_one_pair_and_wide_scatter_decide_nothing() -> None:
    assert evaluate(pairs(1.5, 0, processes=1)).verdict == "UNCLEAR"
    assert evaluate(pairs(1.0, 0, processes=3, noise=0.2)).verdict == "UNCLEAR"


def test_the_ratio_is_of_neighbouring_blocks() -> None:
    result = evaluate([[(1.0, 2.0), (10.0, 20.0)], [(3.0, 6.0), (4.0, 8.0)]])
    assert result.ratio == pytest.approx(2) and result.low == pytest.approx(2) == pytest.approx(result.high)


def test_two_option_sets_are_measured_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    monkeypatch.setattr(interleave, "SAMPLING_SECONDS", 0.1)
    monkeypatch.setattr(interleave, "BLOCK_MS", 2.0)
    sides = ["--a", f"plugin={plugin} times=1", "--b", f"plugin={plugin} times=40"]
    case = ["--attention", "interleaved", "--height", "8", "--width", "8", "--dim", "8"]
    words = ["compare", "--interleave", *sides, *case]
    status = main([*words, "--pairs", "2", "--minutes", "0", "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert "times=1" in result["a"]["case"] and "times=40" in result["b"]["case"]
    (wall,) = result["clocks"].values()
    assert wall["ratio"] > 1 and len(wall["pairs"]) == 2 and status == (wall["verdict"] == "SLOWER")


@pytest.mark.slow
def test_a_side_that_cannot_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--interleave", "--attention", "bra", "--height", "14", "--width", "14"]
    assert main([*words, "--a", "topk=4", "--b", "topk=99"]) == 2
    assert "side B: topk=99 exceeds" in capsys.readouterr().err


def test_a_checkout_is_a_folder_or_a_revision(tmp_path: Path) -> None:
    with side("A", f"checkout={tmp_path} topk=2", ()) as one:
        assert one.root == tmp_path and one.flags == ("--topk=2",)
    with (
        pytest.raises(InvalidOption, match="side B: checkout=no-such is neither a folder nor a revision"),
        side("B", "checkout=no-such", ()),
    ):
        pass
