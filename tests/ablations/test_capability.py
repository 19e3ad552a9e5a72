"""Capability sweeps: their trials, the network, and trainings through the runner: rows, failures, resuming."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ablations.capability.launcher import CapabilityLauncher
from ablations.capability.network import Network, coordinates
from ablations.capability.sweep import CapabilitySweep, discover
from ablations.capability.task import discover as tasks
from ablations.capability.training import Job, count
from ablations.capability.trial import Trial
from ablations.cli import run_all, run_capability
from ablations.harness import sweep as harness
from ablations.harness.local_runner import Settings
from attention_zoo import Block, InvalidOption, build, load_plugin, names
from attention_zoo.core import registry
from profiling.schema.capability import CAPABILITY, load, summary, validate
from profiling.schema.row import SchemaError

ROOT = Path(__file__).resolve().parents[2]
UNTRAINABLE = str(ROOT / "tests" / "plugins" / "untrainable.py")
SWEEPS = discover()
SHORT = {"task": ("recall",), "steps": (4,), "batch": (2,)}
each_sweep = pytest.mark.parametrize("name", SWEEPS)


def test_capability_sweeps_exist_and_are_no_cost_sweeps() -> None:
    assert {"capability", "capability_bra", "capability_pilot"} == set(SWEEPS)
    assert not set(SWEEPS) & set(harness.discover())


@each_sweep
def test_sweep_has_question_expectation_and_command(name: str) -> None:
    sweep, text = SWEEPS[name], (ROOT / "ablations" / "sweeps" / f"{name}.py").read_text()
    assert sweep.question.endswith("?") and len(sweep.expect) > 20 and len(text.splitlines()) <= 65
    assert f"python run_all.py --only {name}\n" in text


@each_sweep
@pytest.mark.parametrize("full", [False, True])
def test_trials_have_distinct_keys_and_smoke_is_small(name: str, full: bool) -> None:
    sweep = SWEEPS[name].in_full() if full else SWEEPS[name]
    trials, smoke = sweep.trials("cpu"), sweep.trials("cpu", smoke=True)
    assert len({trial.key(name, "d") for trial in trials}) == len(trials)
    assert len(smoke) <= 4 and all(trial.number_of_steps <= 20 for trial in smoke)


def test_every_attention_learns_every_task_under_the_same_conditions() -> None:
    load_plugin(UNTRAINABLE)
    trials = SWEEPS["capability"].trials("cpu")
    assert {(trial.name, trial.task) for trial in trials} == {(name, task) for name in names() for task in tasks()}
    assert (
        "untrainable_nan" in names() and len({(trial.learning_rate, trial.batch, trial.dim) for trial in trials}) == 1
    )
    for task in tasks():
        assert len({trial.number_of_steps for trial in trials if trial.task == task}) == 1


def test_options_go_to_the_attentions_that_declare_them_and_defaults_are_left_out() -> None:
    axes = {"name": ("bra", "window"), "task": ("recall",), "topk": (4, 8), "window_size": (4,)}
    trials = CapabilitySweep("q?", "e", products=[axes], smoke={}).trials("cpu")
    assert [(trial.name, trial.options) for trial in trials] == [
        ("bra", ()), ("bra", (("topk", 8),)), ("window", (("window_size", 4),))
    ]  # fmt: skip
    columns = [trial.key_columns("s", "d") for trial in trials]
    assert [(row["topk"], row["n_win"], row["options"]) for row in columns] == [
        (4, 7, ""), (8, 7, "topk=8"), (None, None, "window_size=4")
    ]  # fmt: skip


def test_seeds_follow_each_other_within_a_product() -> None:
    products = [{"name": ("full", "bra"), "task": ("recall",)}, {"name": ("full",), "task": ("count",)}]
    trials = CapabilitySweep("q?", "e", products=products, smoke={}, seeds=2).trials("cpu")
    assert [(trial.task, trial.seed) for trial in trials] == [("recall", 0)] * 2 + [("recall", 1)] * 2 + [
        ("count", 0), ("count", 1)
    ]  # fmt: skip


def test_training_on_a_gpu_runs_under_autocast() -> None:
    sweep = SWEEPS["capability"]
    assert {trial.dtype for trial in sweep.trials("cuda")} == {"bf16"}
    assert {trial.dtype for trial in sweep.trials("cpu")} == {"fp32"}


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("task", ["recall", "match_digits"])
def test_the_network_maps_images_of_either_grid_to_scores_per_token(name: str, task: str) -> None:
    what = tasks()[task]
    with torch.device("meta"):
        net = Network(name, what, 32, 2, 2)
        for side in (14, 28):
            images = torch.empty(2, what.channels, side * what.patch, side * what.patch)
            assert net(images).shape == (2, what.classes, side, side)


def test_networks_differ_in_nothing_but_the_attention() -> None:
    def rest(name: str) -> dict[str, torch.Size]:
        torch.manual_seed(0)
        state = Network(name, tasks()["offset"], 32, 2, 2).state_dict()
        return {key: value.shape for key, value in state.items() if ".attn." not in key}

    assert rest("full") == rest("bra") == rest("window")


def test_bra_takes_its_own_defaults_not_those_of_the_block() -> None:
    net = Network("bra", tasks()["recall"], 32, 2, 1)
    attention, own = net.blocks[0].attn, build("bra", dim=32, num_heads=2)
    assert repr(attention) == repr(own) and attention.n_win == 7 and attention.topk == 4
    assert repr(Block(32, num_heads=2, attention="bra").attn) != repr(own)


def test_coordinates_are_sines_and_cosines_of_row_and_column() -> None:
    waves = coordinates(torch.zeros(1, 3, 4, 5))
    assert waves.shape == (1, 20, 4, 5)
    assert waves[0, 0, 1].tolist() == pytest.approx([1.0] * 5) and waves[0, 10, 2].tolist()[1] == pytest.approx(1.0)


def test_counts_depend_on_the_attention_and_not_on_the_seed() -> None:
    full, window = (count(Job(Trial(name, "recall"))) for name in ("full", "window"))
    assert full["macs_counted"] > window["macs_counted"] and full["params"] != window["params"]
    assert Trial("full", "recall", seed=3, learning_rate=0.1).same_cost() == Trial("full", "recall").same_cost()
    # Two layers of 196 x 196 scores and sums, 32 channels, and eight linear maps of each layer.
    assert full["macs_counted"] > 2 * (2 * 196 * 196 * 32 + 8 * 196 * 32 * 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of results with short trainings of healthy and of failing attentions, and the news of the run."""
    # Tests that follow in this process know nothing of the plugin.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
        result = _trained(tmp_path_factory.mktemp("results"))
        for name in [name for name in sys.modules if name.startswith("attention plugin")]:
            del sys.modules[name]
    return result


def _trained(results: Path) -> tuple[Path, list[str]]:
    load_plugin(UNTRAINABLE)
    bad = ("untrainable_nan", "untrainable_raise", "untrainable_large")
    sweep = CapabilitySweep("q?", "e", products=[], smoke={"name": ("full", "bra", *bad), **SHORT})
    launcher = CapabilityLauncher(Settings(results=results, smoke=True, plugins=(UNTRAINABLE,)))
    news = [text for text, _, _ in launcher.run({"capability": sweep})]
    return launcher.folder / "capability.csv", news


def test_a_training_becomes_a_row(trained: tuple[Path, list[str]]) -> None:
    rows = load(trained[0]).set_index("name")
    for name in ("full", "bra"):
        row = rows.loc[name]
        assert (
            row["status"] == "ok" and row["steps"] == 4 and row["seed"] == 0 and row["optimiser"] == "AdamW one-cycle"
        )
        assert 0 <= row["accuracy"] <= 1 and row["chance"] == 0.125 and 1.5 < row["loss"] < 4
        assert row["answers"] > 50 and row["params"] > 10_000 and row["memory_predicted_bytes"] > row["params"]
        assert row["threads"] == 1 and row["data_share"] < 1 and pd_missing(row["reason"])
        assert 0 <= row["accuracy_double"] <= 1
    assert rows.loc["bra", "topk"] == 4 and rows.loc["bra", "n_win"] == "7"
    assert 0 <= rows.loc["bra", "accuracy_double_auto"] <= 1 and pd_missing(rows.loc["full", "accuracy_double_auto"])


def pd_missing(value: object) -> bool:
    return value is None or value != value or str(value) == "<NA>"


def test_a_diverged_training_is_a_row_with_its_step(trained: tuple[Path, list[str]]) -> None:
    row = load(trained[0]).set_index("name").loc["untrainable_nan"]
    assert row["status"] == "diverged" and pd_missing(row["accuracy"])
    assert row["reason"].startswith("the loss became nan at step ") and row["reason"].endswith("of 4")


def test_a_failure_is_a_row_and_the_run_goes_on(trained: tuple[Path, list[str]]) -> None:
    rows = load(trained[0]).set_index("name")
    assert (
        rows.loc["untrainable_raise", "status"] == "error"
        and rows.loc["untrainable_raise", "reason"] == "ValueError: no"
    )
    large = rows.loc["untrainable_large"]
    assert large["status"] == "ok" and pd_missing(large["accuracy_double"])
    assert large["reason"].startswith("accuracy_double: RuntimeError")
    assert len(rows) == 5


def test_progress_tells_loss_accuracy_and_failures(trained: tuple[Path, list[str]]) -> None:
    news = "\n".join(trained[1])
    assert "capability: recall full seed 0: loss " in news and "(chance 12.5%)" in news
    assert "untrainable_raise seed 0: error: ValueError: no" in news


def test_a_run_resumes_and_gives_the_same_accuracy_for_the_same_seed(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    sweep = CapabilitySweep("q?", "e", products=[], smoke={"name": ("full",), "seed": (0, 1), **SHORT})
    launcher = CapabilityLauncher(Settings(results=trained[0].parents[1], smoke=True))
    list(launcher.run({"capability": sweep}))
    assert launcher.report.skipped == 1 and launcher.report.statuses == {"ok": 1}
    assert [done for _, done, _ in launcher.run({"capability": sweep})] == [0] and launcher.report.skipped == 2
    again = CapabilityLauncher(Settings(results=tmp_path, smoke=True))
    list(again.run({"capability": sweep}))
    first, second = (load(path) for path in (trained[0], again.folder / "capability.csv"))
    first = first[first["name"] == "full"].sort_values("seed").reset_index(drop=True)
    second = second.sort_values("seed").reset_index(drop=True)
    assert list(first["loss"]) == list(second["loss"]) and first["loss"].nunique() == 2
    assert list(first["accuracy"]) == list(second["accuracy"])


def test_no_training_starts_after_the_time_limit(tmp_path: Path) -> None:
    sweep = CapabilitySweep("q?", "e", products=[{"name": ("full",), **SHORT}], smoke={})
    launcher = CapabilityLauncher(Settings(results=tmp_path, minutes=0))
    assert len(list(launcher.run({"capability": sweep}))) == 1 and launcher.report.left == 1


def test_only_a_trained_row_has_an_accuracy(trained: tuple[Path, list[str]]) -> None:
    row = load(trained[0]).query("name == 'full'").iloc[:1].to_dict("records")[0]
    validate([row])
    for change in ({"status": "error"}, {"accuracy": None}, {"accuracy": 1.5}, {"difficulty": "odd"}):
        with pytest.raises(SchemaError):
            validate([row | change])
    assert CAPABILITY.key[-1] == "device_name" and "seed" in CAPABILITY.key


def test_a_summary_has_the_mean_and_the_range_over_seeds(trained: tuple[Path, list[str]]) -> None:
    row = load(trained[0]).query("name == 'full'").iloc[:1].to_dict("records")[0]
    seeds = [row | {"seed": seed, "accuracy": value} for seed, value in enumerate((0.2, 0.9, 0.4))]
    lost = row | {"seed": 3, "accuracy": None, "status": "diverged", "reason": "nan"}
    (result,) = summary(validate([*seeds, lost])).to_dict("records")
    assert (result["accuracy"], result["low"], result["high"]) == pytest.approx((0.5, 0.2, 0.9))
    assert result["seeds"] == 3 and result["failed"] == 1


def test_capability_sweeps_run_only_when_named() -> None:
    cost, trained = run_capability.select(None)
    assert cost and not trained
    assert list(run_capability.select("capability")[1]) == ["capability"]
    with pytest.raises(InvalidOption, match=r"valid: .*topk.*capability"):
        run_capability.select("capabilty")
    with pytest.raises(InvalidOption, match="name no others"):
        run_capability.select("capability,topk")


def test_list_names_them_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--list"]) == 0
    assert "runs only when named: --only capability_bra" in capsys.readouterr().out


def test_slurm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--only", "capability", "--launcher", "slurm", "--device", "cpu"]) == 2
    assert "valid: --launcher local" in capsys.readouterr().err


def test_a_dry_run_counts_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--only", "capability", "--smoke", "--dry-run", "--json", "--device", "cpu", "--results", str(tmp_path)]
    assert run_all.main(words) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["cell"] for cell in cells][:2] == ["recall full seed 0", "texture full seed 0"] and len(cells) == 4
    assert all(cell["memory_predicted_bytes"] > 0 and cell["params"] > 0 for cell in cells)
    assert not list(tmp_path.rglob("*.csv"))
