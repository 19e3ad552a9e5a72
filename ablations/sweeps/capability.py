"""What does a cheaper attention lose? Every attention learns small tasks that each need one ability.

    python run_all.py --only capability

It is run only when named: training takes minutes where counting takes seconds.
"""

from ablations.capability.sweep import CapabilitySweep
from ablations.harness.sweep import attentions

KNOWN = ("full", "pseudo_conv", "window", "bra", "linear", "axial", "pooled", "neighborhood", "shifted_window")
TASKS = ("recall", "offset", "count", "match_digits", "texture")
MANY_HOPS = ("connect",)
"""Last: at this budget full attention does not learn it, and a convolution does better."""


def known() -> list[str]:
    """The attentions that most others descend from: a run that is cut off answers something."""
    return [name for name in KNOWN if name in attentions()]


def others() -> list[str]:
    """All other attentions, plugins too."""
    return [name for name in attentions() if name not in KNOWN]


SWEEP = CapabilitySweep(
    question="What is each attention able to learn, at a 14 x 14 grid: recall, offset, count, match, texture, connect?",
    expect="full solves what routing needs; windows fail beyond their reach; all pass texture. 30 min.",
    products=[
        {"name": known, "task": TASKS},
        {"name": others, "task": TASKS},
        {"name": attentions, "task": MANY_HOPS},
    ],
    smoke={"name": ("full", "window"), "task": ("recall", "texture"), "steps": (20,)},
    full=[{"name": attentions, "task": TASKS[:4], "difficulty": ("hard",)}],
)
