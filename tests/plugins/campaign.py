"""Cells for tests of campaigns: they work, crash, kill their task, or are slow."""

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from attention_zoo import register

if "SLURM_JOB_ID" in os.environ and "CAMPAIGN_DOOMED" in os.environ:
    raise RuntimeError("the disk of this node is gone")


class Linear(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not x.is_meta:
            self.act()
        return self.mix(x)

    def act(self) -> None:
        """Nothing more."""


@register("task_fine")
class Fine(Linear):
    """Works."""


@register("task_served")
class Served(Linear):
    """Notes which fork server it was forked from."""

    def act(self) -> None:
        with Path(os.environ["CAMPAIGN_SERVERS"]).open("a") as file:
            file.write(f"{os.getppid()}\n")


@register("task_segfault")
class Segfault(Linear):
    """Crashes, alone."""

    def act(self) -> None:
        signal.raise_signal(signal.SIGSEGV)


@register("task_flaky")
class Flaky(Linear):
    """Crashes until it is mended."""

    def act(self) -> None:
        if "CAMPAIGN_MENDED" not in os.environ:
            signal.raise_signal(signal.SIGSEGV)


@register("task_killer")
class Killer(Linear):
    """Kills the task, which is the grandparent process: the parent is the fork server."""

    def act(self) -> None:
        task = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(task, signal.SIGKILL)
        time.sleep(60)


@register("task_slow")
class Slow(Linear):
    """Is slow once, so that the test can interfere meanwhile."""

    def act(self) -> None:
        time.sleep(0.5)
