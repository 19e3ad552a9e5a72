"""Which learning rate is best on average? The one that all capability sweeps use for all attentions alike.

python run_all.py --only capability_pilot
"""

from ablations.capability.sweep import CapabilitySweep

SWEEP = CapabilitySweep(
    question="Which of three learning rates gives the best accuracy on average over attentions and tasks?",
    expect="0.01: the lowest is slow to leave the plateau, the highest does not converge. 5 min.",
    products=[
        {
            "name": ("full", "bra", "window", "linear"),
            "task": ("recall", "offset", "count"),
            "learning_rate": (0.003, 0.01, 0.03),
        }
    ],
    smoke={"name": ("full",), "task": ("recall",), "learning_rate": (0.01,), "steps": (20,)},
)
