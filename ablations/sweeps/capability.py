"""What does a cheaper attention lose? Every attention learns small tasks that each need one ability.

    python run_all.py --only capability

It is run only when named: training takes minutes where counting takes seconds.
"""

from ablations.capability.sweep import CapabilitySweep
from ablations.harness.sweep import attentions

FIRST = ("full", "pseudo_conv", "window", "bra", "linear", "axial", "pooled", "neighborhood", "shifted_window")
TASKS = ("recall", "offset", "count", "match_digits", "texture", "connect")


def ordered() -> list[str]:
    """All attentions, the best known first: a run that is cut off answers something."""
    names = attentions()
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]


SWEEP = CapabilitySweep(
    question="What is each attention able to learn, at a 14 x 14 grid: recall, offset, count, match, texture, connect?",
    expect="full solves what routing needs; windows fail beyond their reach; all pass texture. 25 min.",
    products=[{"name": ordered, "task": TASKS}],
    smoke={"name": ("full", "window"), "task": ("recall", "texture"), "steps": (20,)},
    full=[{"name": ordered, "task": TASKS[:4], "difficulty": ("hard",)}],
)
