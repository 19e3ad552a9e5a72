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


def test_macs_of_the_backward_pass() -> None:
    forward = 2 * 50 * 64 * 32
    assert macs.counted(workload("linear", "forward_backward")) == (forward, 2 * forward)
    no_input = Workload(nn.Linear(64, 32), torch.randn(2, 50, 64), "forward_backward", input_gradient=False)
    assert macs.counted(no_input) == (forward, forward)


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
