"""The gated coarse term of BRA."""

from typing import Any

import pytest
import torch
from bra_options_oracle import CHOSEN, DEFAULTS
from bra_oracle import draw, kv, relative

from attention_zoo import build
from profiling.cases.workload import Workload
from profiling.meters import operator_times


def test_the_coarse_term_passes_gradients_to_queries_and_keys_that_routing_detaches() -> None:
    """With one key per region and topk 1 the fine softmax is constant, and so are its gradients."""
    fine = dict(topk=1, **kv("ada_avgpool", per_win=1))
    for gate in (False, True):
        drawn = draw(**fine, coarse_gate=gate)
        drawn.module(drawn.x).square().sum().backward()
        of_queries = drawn.module.get_parameter("qkv.qkv.weight").grad[:12].abs().max().item()
        assert of_queries > 1e-3 if gate else of_queries < 1e-9


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_gate_of_zero_is_no_gate_and_of_one_adds_full_attention_of_single_tokens(impl: str) -> None:
    tokens = dict(grid=(6, 6), n_win=6, side_dwconv=0)
    gated, off = (draw(impl, topk=5, coarse_gate=on, **tokens) for on in (True, False))
    everything, x = draw(impl, topk=36, **tokens), off.x
    for one in (gated, everything):
        one.module.load_state_dict(off.module.state_dict(), strict=False)
    gate: Any = gated.module.coarse_gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.zero_()
        assert torch.equal(gated.module(x), off.module(x))
        gate.bias.fill_(1.0)
        both = off.module(x) + everything.module(x) - off.module.get_parameter("wo.bias")
        assert relative(gated.module(x), both) < 1e-12


def test_off_they_add_no_parameter_and_on_only_the_gate() -> None:
    names = {how: list(draw(**chosen).module.state_dict()) for how, chosen in ({"off": {}} | CHOSEN).items()}
    assert names["off"] == ["qkv.qkv.weight", "qkv.qkv.bias", "lepe.weight", "lepe.bias", "wo.weight", "wo.bias"]
    assert names["token"] == names["off"] and DEFAULTS["coarse_gate"] is DEFAULTS["per_token_routing"] is False
    assert names["gate"] == names["both"] == [*names["off"], "coarse_gate.weight", "coarse_gate.bias"]


def test_the_gate_leaves_the_other_weights_of_a_seed_as_they_are() -> None:
    made = []
    for on in (False, True):
        torch.manual_seed(0)
        made.append(build("bra", dim=8, num_heads=2, n_win=2, topk=1, coarse_gate=on).state_dict())
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_the_coarse_term_is_a_stage(impl: str) -> None:
    for chosen in CHOSEN.values():
        module = build("bra", dim=8, num_heads=2, n_win=2, topk=1, impl=impl, **chosen)
        work = Workload(module, torch.randn(1, 8, 8, 8), "forward_backward")
        stages = {one["name"]: one for one in operator_times.breakdown(work, "cpu")["stages"]}
        gated = {"bra.coarse"} if "coarse_gate" in chosen else set()
        assert set(stages) == {"bra.project", "bra.route", "bra.attend", "bra.lepe", "bra.output"} | gated
        # The means of keys that sdpa routes by serve the coarse term too.
        shared = {"bra.route"} if gated and impl == "sdpa" else set()
        assert {name for name, part in stages.items() if part["backward_ms"]} == set(stages) - {"bra.route"} | shared


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_hooks_see_the_gate(chosen: dict[str, Any]) -> None:
    for impl in ("reference", "sdpa"):
        drawn, seen = draw(impl, **chosen), []
        for name, part in drawn.module.named_modules():
            if name == "coarse_gate":
                part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        drawn.module(drawn.x)
        assert len(seen) == ("coarse_gate" in chosen)
