"""The house colours and marks for a page in a light and a dark theme."""

from typing import Any

from notebooks.lib.plots import FAMILIES, family, style

PATHS = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "<": "triangle-left",
    ">": "triangle-right", "P": "cross", "D": "diamond",
    "d": "M0,-1L.55,0L0,1L-.55,0Z", "p": "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z",
    "h": "M0,-1L.87,-.5L.87,.5L0,1L-.87,.5L-.87,-.5Z", "H": "M-1,0L-.5,-.87L.5,-.87L1,0L.5,.87L-.5,.87Z",
    "8": "M-.38,-.92L.38,-.92L.92,-.38L.92,.38L.38,.92L-.38,.92L-.92,.38L-.92,-.38Z",
}  # fmt: skip
"""Marks of matplotlib as shapes of Vega."""
DARK_GROUND = (0x14, 0x18, 0x1D)
CONTRAST = 3.0
"""Least contrast of a graphical object, WCAG 2.2, 1.4.11."""


def marks(names: list[str]) -> dict[str, Any]:
    """Per attention its family, colour in both themes and shape; families in the house's order."""
    order = [*FAMILIES, "other"]
    listed = [name for members in FAMILIES.values() for name in members]
    ranked = sorted(names, key=lambda name: (listed.index(name) if name in listed else len(listed), name))
    return {
        name: {"family": family(name), "rank": order.index(family(name)), "light": style(name)[0],
               "dark": on_dark(style(name)[0]), "shape": PATHS[style(name)[1]]}
        for name in ranked
    }  # fmt: skip


def on_dark(colour: str) -> str:
    """The colour mixed with as much white as it takes to be seen on the dark ground."""
    rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    for share in range(0, 101, 2):
        mixed = [round(value + (255 - value) * share / 100) for value in rgb]
        if (_luminance(mixed) + 0.05) / (_luminance(DARK_GROUND) + 0.05) >= CONTRAST:
            break
    return "#" + "".join(f"{value:02X}" for value in mixed)


def _luminance(rgb: tuple[int, ...] | list[int]) -> float:
    linear = [v / 12.92 if (v := value / 255) <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
