"""A trial: one network to be trained once on one task. It holds only names and numbers: key, row and message."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ablations.capability.network import Network
from ablations.capability.task import MEDIUM, Task, get
from attention_zoo import options
from profiling.schema.capability import CAPABILITY
from profiling.schema.table import as_text

OPTIMISER = "AdamW one-cycle"


@dataclass(frozen=True)
class Trial:
    """One training. ``options`` are those of the attention, the others take their defaults."""

    name: str
    task: str
    options: tuple[tuple[str, Any], ...] = ()
    difficulty: str = MEDIUM
    grid: int = 14
    dim: int = 32
    num_heads: int = 2
    depth: int = 2
    batch: int = 8
    learning_rate: float = 0.01
    steps: int | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    @property
    def what(self) -> Task:
        """Its task."""
        return get(self.task)

    @property
    def number_of_steps(self) -> int:
        """Its own, or those of the task."""
        return self.steps or self.what.steps

    def network(self, **changed: Any) -> Network:
        """Build the network on the current default device; ``changed`` options replace its own."""
        return Network(self.name, self.what, self.dim, self.num_heads, self.depth, **dict(self.options) | changed)

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of ``batch`` images."""
        side = self.grid * self.what.patch
        return batch, self.what.channels, side, side

    def key_columns(self, sweep: str, device_name: str) -> dict[str, Any]:
        """The key columns of its row."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("grid", "options")}
        bra = {name: option.default for name, option in options("bra").items()} | dict(self.options)
        routed = {name: bra[name] if self.name == "bra" else None for name in ("topk", "n_win")}
        return own | routed | {
            "sweep": sweep, "device_name": device_name, "height": self.grid, "width": self.grid,
            "steps": self.number_of_steps, "optimiser": OPTIMISER, "options": self.options_as_text(),
        }  # fmt: skip

    def key(self, sweep: str, device_name: str) -> tuple[str, ...]:
        """The unique key of its row in a results file, as CSV text."""
        values = self.key_columns(sweep, device_name)
        return tuple(as_text(values.get(column)) for column in CAPABILITY.key)

    def same_cost(self) -> "Trial":
        """Equal for trials of equal counts and memory."""
        return replace(self, seed=0, learning_rate=0.01, difficulty=MEDIUM, steps=1)

    def options_as_text(self) -> str:
        """The options as name=value name=value."""
        return " ".join(f"{name}={as_text(value)}" for name, value in self.options)

    def __str__(self) -> str:
        extras = [self.difficulty if self.difficulty != MEDIUM else "", f"seed {self.seed}"]
        extras += [f"learning rate {self.learning_rate:g}"] if self.learning_rate != 0.01 else []
        words = [self.task, self.name, self.options_as_text(), *extras, self.dtype if self.dtype != "fp32" else ""]
        return " ".join(filter(None, words))
