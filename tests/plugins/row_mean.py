"""A full member of the zoo in one file outside of it: everything that the contract requires, and an option."""

from torch import nn

from attention_zoo import register
from attention_zoo.core.base import Attention, Macs


@register("row_mean")
class RowMean(Attention):
    """Each token is joined by the mean of its row, ``passes`` times."""

    citation = "None: an example"
    exponent = 1

    def __init__(self, dim: int, num_heads: int, impl: str = "auto", *, passes: int = 1) -> None:
        super().__init__(dim, num_heads, impl)
        self.passes = passes
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        self.chosen_impl(x)
        x = self.value(x)
        for _ in range(self.passes):
            x = x + x.mean(dim=2, keepdim=True)
        return self.proj(x)

    def macs(self, height, width):
        return Macs(projection=2 * height * width * self.dim**2)

    def kv_tokens_per_query(self, height, width):
        return width
