"""MACs against numbers computed by hand, by three counters."""

from contextlib import nullcontext

import pytest
import torch
from small_modules import workload
from torch import nn

from profiling.cases.case import Case
from profiling.cases.workload import Workload
from profiling.meters import macs


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_a_module_in_the_modes_it_was_in(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
    module[1].eval()
    if fails:
        monkeypatch.setattr(macs, "FlopCountAnalysis", lambda *arguments: [][0])
    with pytest.raises(IndexError) if fails else nullcontext():
        macs.by_fvcore(Workload(module, torch.randn(1, 4)))
    assert [part.training for part in module.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 2 * 50 * 64 * 32),
        ("convolution", 2 * 20 * 20 * 24 * 16 * 9),
        ("strided convolution", 15 * 13 * 16 * 8 * 4),
        ("convolution, channels last", 2 * 20 * 20 * 24 * 16 * 9),
        ("depthwise convolution", 24 * 24 * 32 * 25),
        ("fused attention", 2 * 2 * 150 * 150 * 16 * 2),
        ("tied weights", 2 * 9 * 40 * 40),
    ],
)
def test_macs_by_hand_counted_and_by_fvcore(name: str, expected: int) -> None:
    for device in ("cpu", "meta"):
        assert macs.counted(workload(name, device=device)) == (expected, 0)
    assert macs.by_fvcore(workload(name)) == expected


@pytest.mark.parametrize(
    ("module", "shape", "forward"),
    [
        (nn.Linear(64, 32), (2, 50, 64), 2 * 50 * 64 * 32),
        (nn.Conv2d(8, 16, 2, stride=2), (1, 8, 30, 26), 15 * 13 * 16 * 8 * 4),
        (nn.Conv2d(32, 32, 5, padding=2, groups=32), (2, 32, 24, 24), 2 * 24 * 24 * 32 * 25),
        (nn.Conv2d(8, 12, 3, stride=2, groups=4), (2, 8, 9, 7), 2 * 4 * 3 * 12 * 2 * 9),
        (nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), (2, 8, 9, 7), 2 * 9 * 7 * 8 * 3 * 4),
        (nn.Conv1d(8, 8, 3, groups=8), (2, 8, 11), 2 * 9 * 8 * 3),
    ],
    ids=repr,
)
def test_macs_of_the_backward_pass(module: nn.Module, shape: tuple[int, ...], forward: int) -> None:
    x = torch.randn(shape)
    assert macs.counted(Workload(module, x, "forward_backward")) == (forward, 2 * forward)
    assert macs.counted(Workload(module, x, "forward_backward", input_gradient=False)) == (forward, forward)


def test_macs_of_routing_without_a_gradient_have_no_backward_pass() -> None:
    case = Case("bra", 28, 28, 64, 2, (("side_dwconv", 5),), impl="reference", mode="forward_backward")
    forward, backward = macs.counted(case.workload("meta"))
    formula = macs.analytic(case.module(), 28, 28)
    assert formula is not None and formula.routing > 0
    assert backward == 2 * (forward - formula.routing)


def test_fvcore_counts_normalisations_and_leaves_the_module_as_it_was() -> None:
    work = workload("mlp", "forward_backward")
    assert macs.by_fvcore(work) > macs.counted(work)[0] == 2 * 2 * 100 * 32 * 96
    assert work.module.training


def test_macs_by_formula() -> None:
    module = Case("full", 6, 5, 16, 2).module()
    formula = macs.analytic(module, 6, 5)
    assert formula is not None
    assert (formula.projection, formula.attention, formula.total) == (4 * 30 * 256, 2 * 900 * 16, 30720 + 28800)
    assert macs.analytic(nn.Linear(3, 3), 6, 5) is None
