"""Tables of the notebooks, from rows whose findings can be worked out by hand."""

import pandas as pd
import pytest
from made_up_rows import cell

from notebooks.lib import plots
from notebooks.tables import break_even, prediction, published, speed, targets
from profiling.schema.row import validate


@pytest.mark.parametrize(
    ("ours", "full", "side", "words"),
    [
        ({8: 4.0, 32: 4.0}, {8: 1.0, 32: 16.0}, 16.0, "near 16 (not faster at 8, faster at 32)"),
        (
            {8: 1.0, 16: 9.0, 32: 1.0},
            {8: 2.0, 16: 1.0, 32: 9.0},
            16 * 2**0.5,
            "near 23 (not faster at 16, faster at 32)",
        ),
        ({8: 1.0, 64: 1.0}, {8: 2.0, 32: 1.0}, None, "faster at every measured grid, from 8"),
        ({8: 3.0, 16: 3.0}, {8: 2.0, 16: 3.0}, None, "not faster up to 16, the largest grid measured with both"),
        ({8: 3.0}, {16: 3.0}, None, "not measured at one grid"),
    ],
)
def test_break_even(ours: dict[int, float], full: dict[int, float], side: float | None, words: str) -> None:
    result = break_even.break_even(pd.Series(ours), pd.Series(full))
    assert result[1] == words and result[0] == (None if side is None else pytest.approx(side))


def test_gpu_targets_are_listed_beside_measurements() -> None:
    rows = []
    for impl, ms, graph in (
        ("reference", 10.0, True),
        ("triton", 1.0, True),
        ("triton", 1.0, False),
        ("flex", 1.2, False),
    ):
        more = {"impl_requested": impl, "dtype": "bf16", "device": "cuda", "cuda_graph": graph}
        for batch in (1, 128):
            at_56 = 2.0 if batch > 1 else ms
            for side, topk, time in ((112, 4, ms), (56, 1, at_56)):
                shape = {"n_win": "7", "topk": topk, "batch": batch, speed.DEVICE_TIME: time}
                rows.append(cell("bra_speed", "bra", "forward", side, 2**20, 2 * time, **more, **shape))
    with plots.kept() as shown:
        targets.table(plots.Results(validate(rows)))
    (table,) = map(str, shown)
    at = "112 x 112 x 64, topk 4, n_win 7"
    where = "at 112, 224, 256, bf16, as fast, each | forward"
    kernels, published = "triton, CUDA graph", "reference, CUDA graph"
    assert f"| {kernels} against {published}, {where} | 8.00x | 10.0x (mean of 1) | 10.0x | {at} | yes |" in table
    assert f"| triton against flex, {where} | 1.30x | 1.20x (mean of 1) | 1.20x | {at} | no |" in table
    assert f"| triton against reference, compiled, {where} | 3.00x |  |  |  |  |" in table
    small = "at 56, 28, 14, batch 128, bf16, as fast, each | forward | 1.00x | 1.00x (mean of 1) | 1.00x"
    assert f"| {kernels} against {published}, {small} | 56 x 56 x 64, topk 1, n_win 7, batch 128 | yes |" in table
    assert "sdpa" not in table


def test_wrong_prediction_is_reported_with_its_cell() -> None:
    rows = [cell("topk", "bra", "forward", side, 2**20, 1.0, n_win="7", topk=1, impl="sdpa") for side in (7, 14)]
    rows[1]["memory_peak_bytes"] = 2**19
    with plots.kept():
        result = prediction.findings(plots.Results(validate(rows)))
    assert result == [
        "Predicted and measured peak memory differ by at most 100.000% in 2 measured cells (bra, sdpa, forward at "
        "14 x 14, fp32); 1 cells by more than 3 %."
    ]


def test_speed_ups_keep_settings_launches_and_batches_apart() -> None:
    more = {"n_win": "7", "topk": 1}
    rows = [cell("bra_speed", "bra", "forward", 56, 2**20, 8.0, **more)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, ms, compiled=True, replicate=r, **more)
             for r, ms in enumerate((1.0, 2.0, 9.0))]  # fmt: skip
    big = {"device": "cuda", "dtype": "bf16", "batch": 128} | more
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 6.0, **big)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 4.0, cuda_graph=True, **big)]
    rows += [cell("bra_speed", "bra", "forward", 56, 2**20, 2.0, cuda_graph=True, impl_requested="triton", **big)]
    times = speed.ratios(speed.wide(validate(rows), speed.TIME))
    assert times.columns.tolist() == ["reference", "reference, CUDA graph", "reference, compiled", "triton, CUDA graph"]
    unmodified, graph = times["reference, compiled"].dropna(), times["triton, CUDA graph"].dropna()
    assert unmodified.index.tolist() == [("forward", "fp32", 1, 56, 56, 64, 2, 1, "7")] and unmodified.tolist() == [4.0]
    assert graph.index.tolist() == [("forward", "bf16", 128, 56, 56, 64, 2, 1, "7")] and graph.tolist() == [2.0]
    assert speed.geometric_mean(pd.Series([2.0, 18.0, None])) == pytest.approx(6.0)
    other = cell("bra_speed", "bra", "forward", 56, 2**20, 8.0, n_win="7", topk=8)
    assert len(speed.of_the_eight(speed.wide(validate([*rows, other]), speed.TIME))) == 2


def test_published_figures_are_only_published() -> None:
    table = published.published()
    assert list(table.columns) == ["model", "published_params_m", "published_macs_g", "published_top1", "source"]
    assert set(published.MODELS.values()) <= set(table["model"])
    assert (table["source"] != "").all() and (table["published_macs_g"].astype(float) > 0).all()


@pytest.mark.parametrize(
    ("text", "count", "shown"), [("13.1", 13.142, "(+0.32%)"), ("13.1", 13.16, "+0.46%"), ("", 1.0, "")]
)
def test_difference_is_in_brackets_if_it_is_rounding(text: str, count: float, shown: str) -> None:
    assert published.difference(text, count, 1.0) == shown
