"""What the figures draw and the findings beside them, from rows whose findings can be worked out by hand."""

import math
from itertools import product
from typing import Any

import pandas as pd
import pytest
from made_up_rows import PARTS, cell

from notebooks.figures import cost_split, crossover, curves, latency, pareto, routes, speed_figure
from notebooks.lib import plots
from profiling.schema.row import validate


def test_launch_bound_grids_are_reported_for_a_gpu() -> None:
    timed = ((8, 3.0), (16, 2.5), (64, 1.0))
    rows = [cell("resolution", "full", "forward", n, 1, 1.0, device="cuda", launch_bound=x) for n, x in timed]
    results = plots.Results(validate(rows))
    with plots.kept() as shown:
        latency.launches(results)
        result = latency.findings(results)
    assert "| full | 3.00 | 2.50 | 1.00 |" in str(shown[0])
    assert any("up to 16 x 16 launching" in sentence for sentence in result)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"full": "ok", "bra": "ok"}, False),
        ({"full": "predicted", "bra": "predicted"}, False),
        ({"full": "ok", "bra": "oom"}, False),
        ({"full": "ok", "bra": "predicted"}, True),
    ],
)
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
def test_caption_says_what_a_line_of_latency_that_ends_early_means(
    mode: str, status: dict[str, str], said: bool
) -> None:
    """All is timed, but for one mode at the largest grid."""
    rows = []
    for name, at, side in product(status, ("forward", "forward_backward"), (8, 16, 32)):
        is_ok = (at, side) != (mode, 32) or status[name] == "ok"
        more = {} if is_ok else {"status": status[name]}
        rows.append(cell("resolution", name, at, side, 2**20, 1.0 if is_ok else None, **more))
    results = plots.Results(validate(rows))
    with plots.kept():
        for figure in (latency.figure(results), curves.figure(results, mode)):
            assert ("ends early, without a cross" in figure.get_supxlabel()) is said


def test_caption_says_nothing_of_a_mode_without_latencies() -> None:
    rows = [cell("resolution", name, "forward", side, 2**20, 1.0) for name in ("full", "bra") for side in (8, 16)]
    rows += [cell("resolution", "bra", "forward_backward", 16, 2**20, None)]
    with plots.kept():
        figure = latency.figure(plots.Results(validate(rows)))
    assert "ends early" not in figure.get_supxlabel()


@pytest.mark.parametrize(("batch", "said"), [(1, False), (2, True)])
def test_caption_explains_batch_where_a_shape_has_one(batch: int, said: bool) -> None:
    at = {"n_win": "7", "topk": 4, "batch": batch}
    rows = [cell("bra_speed", "bra", "forward", 56, 2**20, 8.0 / n, impl_requested=impl, **at)
            for n, impl in enumerate(("reference", "sdpa"), 1)]  # fmt: skip
    with plots.kept():
        figure = speed_figure.figure(plots.Results(validate(rows)))
    assert ("b: batch." in figure.get_supxlabel()) is said


def ratio(low: list[float], middle: list[float], high: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"low": low, "middle": middle, "high": high}, index=[10, 20, 40][: len(low)])


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (ratio([2, 0.5, 0.125], [4, 1, 0.25], [8, 2, 0.5]), [(20, math.sqrt(200), math.sqrt(800), True)]),
        (ratio([0.125, 0.5], [0.5, 2], [2, 8]), [(math.sqrt(200), None, None, False)]),
        (ratio([0.125, 0.5, 1], [0.5, 2, 4], [0.5, 2, 4]), [(math.sqrt(200), math.sqrt(200), None, False)]),
        (ratio([2, 3, 2], [2, 3, 2], [2, 3, 2]), []),
        (ratio([1, 1], [1, 1], [1, 1]), []),
        (ratio([0.1], [0.1], [0.1]), []),
        (ratio([], [], []), []),
        (
            ratio([4, 0.25, 4], [4, 0.25, 4], [4, 0.25, 4]),
            [
                (math.sqrt(200), math.sqrt(200), math.sqrt(200), True),
                (math.sqrt(800), math.sqrt(800), math.sqrt(800), False),
            ],
        ),
    ],
    ids=["interval", "open at both ends", "open above", "none", "equal", "one grid", "no grid", "twice"],
)
def test_crossings(measured: pd.DataFrame, expected: list[tuple[float, float | None, float | None, bool]]) -> None:
    def close(value: float | None) -> Any:
        return None if value is None else pytest.approx(value)

    result = [(one.side, one.low, one.high, one.falling) for one in crossover.crossings(measured)]
    assert result == [(close(side), close(low), close(high), falling) for side, low, high, falling in expected]


def measured(times: dict[str, list[Any]], **more: Any) -> plots.Results:
    """A resolution sweep at grids of 8 and 16 with these times."""
    pairs = [(name, side, ms) for name, both in times.items() for side, ms in zip((8, 16), both, strict=True)]
    return plots.Results(
        validate([cell("resolution", name, "forward", side, 100, ms, **more) for name, side, ms in pairs])
    )


def test_break_even_is_reported_with_its_interval() -> None:
    # 1/2 to 2 passes 1 half way in log-log; with quartiles of 0.8 and 1.25, so does 0.32 to 1.28, and 0.78 to 3.1.
    results = measured({"bra": [1, 2], "window": [2, 1], "full": [4, 8]})
    low, high = (8 * 2 ** (math.log(1 / start) / math.log(4)) for start in (0.78125, 0.32))
    with plots.kept():
        said = crossover.findings(results)
    assert said == [
        "Forward, bra (reference implementations) against full: no break-even in the measured range; it is faster "
        "throughout, and takes 0.250x at 8 and 0.250x at 16 the other's time.",
        f"Forward, bra (reference implementations) against window: slower from near 11 (between {low:.0f} and "
        f"{high:.0f}) tokens per side on; at 16 x 16 it takes 2.00x the other's time.",
    ]
    assert (round(low), round(high)) == (9, 14)


def test_one_common_grid_is_no_range() -> None:
    with plots.kept():
        said = crossover.findings(measured({"bra": [1, None], "full": [2, None]}))
    assert len(said) == 1 and said[0].endswith("it is faster throughout, and takes 0.500x at 8 the other's time.")


def test_break_even_compares_only_equal_settings() -> None:
    rows = [cell("resolution", "bra", "forward", side, 100, 1.0, impl_requested="sdpa") for side in (8, 16)]
    rows += [cell("resolution", "full", "forward", side, 100, 1.0) for side in (8, 16)]
    with plots.kept() as shown:
        crossover.table(plots.Results(validate(rows)))
    assert shown == ["The `resolution` sweep holds no rows of bra beside full or window in the same setting."]


def test_pareto_front() -> None:
    costs = pd.DataFrame({"ms": [1, 2, 3, 1, 4], "bytes": [4, 2, 1, 4, 4]}, index=list("abcde"))
    assert pareto.front(costs).to_dict() == {"a": True, "b": True, "c": True, "d": True, "e": False}


def test_membership_of_the_front_accounts_for_noise() -> None:
    columns = {"latency": [1.0, 1.1, 5.0, 0.5], "low": [0.9, 0.95, 4.9, 0.4], "high": [1.2, 1.3, 5.1, 0.6]}
    columns |= {"memory": [1.0, 1.0, 1.0, 9.0], "macs": [1.0, 1.0, 1.0, 1.0]}
    result = pd.DataFrame(columns, index=["fast", "alike", "slow", "large"])
    result.loc["unknown"] = [float("nan"), float("nan"), float("nan"), 1.0, 1.0]
    expected = {"fast": "within noise", "alike": "within noise", "slow": "no", "large": "yes", "unknown": ""}
    assert pareto.membership(result, pareto.COSTS).to_dict() == expected


def test_failed_cells_take_their_room_once_from_panels_that_share_an_axis() -> None:
    timed = [cell("resolution", name, "forward", 16, 2**20, ms, macs_counted=10, kv_tokens_per_query=4)
             for name, ms in (("bra", 1.0), ("window", 4.0))]  # fmt: skip
    failed = cell(
        "resolution", "full", "forward", 16, 2**22, None, status="oom", macs_counted=40, kv_tokens_per_query=16
    )
    heights = []
    for rows in (timed, [*timed, failed]):
        with plots.kept():
            figure = pareto.figure(plots.Results(validate(rows)), "forward")
        assert figure is not None
        heights.append([math.log(high / low) for low, high in (ax.get_ylim() for ax in figure.axes)])
        names = [{text.get_text().split(":")[0] for text in ax.texts} - {""} for ax in figure.axes]
        assert names == [{"bra", "window", *(["full"] if failed in rows else [])}] * 3
    # One row of crosses takes 6 % of a panel.
    assert heights[1] == pytest.approx([height / 0.94 for height in heights[0]])


def test_costs_of_a_step_count_the_backward_pass() -> None:
    row = cell(
        "resolution", "bra", "forward_backward", 16, 2**20, 1.0, macs_counted=1_000_000, macs_backward_counted=2_000_000
    )
    point = pareto.points(plots.Results(validate([row])), "forward_backward").loc["bra"]
    assert (point["macs"], point["memory"], point["low"], point["high"]) == (3.0, 1.0, 0.8, 1.25)


def test_shares_of_the_cost() -> None:
    row = cell("topk", "bra", "forward", 56, 100, 1.0, n_win="7", topk=4, macs_counted=100, **PARTS)
    assert cost_split.split(validate([row])).iloc[0].tolist() == [0.5, 0.1, 0.3, 0.1]


def test_regions_and_keys_reached_by_topk() -> None:
    more = {"n_win": "7", "topk": 4, "regions_per_side": 7, "kv_tokens_per_query": 256, "macs_counted": 100} | PARTS
    result = routes.reached(plots.Results(validate([cell("topk", "bra", "forward", 56, 100, 1.0, **more)]))).iloc[0]
    assert (result["regions"], result["keys"], result["share"], result["routing"]) == (49, 256, 256 / 3136, 0.1)
