"""Pictures of the regions that BRA routes a query to, and the share of tokens reached by topk."""

import shutil
import tempfile
from pathlib import Path

import pandas as pd
from IPython.display import Image, display

from notebooks.lib.export import markdown
from notebooks.lib.plots import ROOT, Results, needs, number, say, without_more
from notebooks.lib.programs import figures_folder, run, torch_is_there

QUERY = "0.37,0.44"
"""Row and column: fractions of the picture's sides, or pixels."""
OPTIONS = ""
"""Options of the command, such as ``--n-win 8``."""
IMAGE = ""
"""Path of your picture; empty: the photograph that comes with matplotlib."""


def draw(query: str = QUERY, options: str = OPTIONS, image: str = IMAGE) -> None:
    """Draw the routes of ``query`` (row,column) if PyTorch is installed; show all stored pictures of routes."""
    folder, words = figures_folder(), ["attention_zoo", "bra", "--query", query, *options.split()]
    command = f"`python -m {' '.join(words)}`"
    if torch_is_there():
        words += ["--image", str(ROOT / image)] if image else []
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            # The command prints the name of the file that it writes.
            shutil.copyfile(Path(scratch) / run(*words, folder=Path(scratch)).strip(), folder / "routes.png")
        say(f"Drawn just now: {command}.")
    kept = sorted(folder.glob("routes*.png"))
    if not torch_is_there():
        none = f"There is no PyTorch here, and no picture: {command} draws one."
        say("There is no PyTorch here: these pictures were drawn before." if kept else none)
    for path in kept:
        display(Image(filename=str(path), width=900))


def reached(results: Results) -> pd.DataFrame:
    """Regions and tokens that a query attends to, over n_win and topk; from the forward rows of the topk sweep."""
    rows = (
        without_more(results.sweep("topk"))
        .query("mode == 'forward'")
        .dropna(subset=["kv_tokens_per_query", "regions_per_side"])
    )
    tokens = (rows["height"] * rows["width"]).astype(float)
    result = pd.DataFrame({
        "n_win": rows["n_win"], "topk": rows["topk"].astype(int),
        "regions": (rows["regions_per_side"] ** 2).astype(int),
        "keys": rows["kv_tokens_per_query"], "share": rows["kv_tokens_per_query"] / tokens,
        "routing": rows["macs_routing"].astype(float) / rows["macs_analytic"].astype(float),
    })  # fmt: skip
    return result.drop_duplicates(["n_win", "topk"]).sort_values(["regions", "topk"])


@needs("topk")
def table(results: Results) -> None:
    """Table: how much of the picture each topk reaches, and what choosing the regions costs."""
    result = reached(results)
    texts = pd.DataFrame({
        "regions": [f"{n_win} x {n_win}" for n_win in result["n_win"]],
        "topk": result["topk"],
        "keys per query": [f"{keys:,.0f}" for keys in result["keys"]],
        "share of the tokens": [f"{share:.1%}" for share in result["share"]],
        "routing, share of the MACs": [f"{share:.2%}" for share in result["routing"]],
    })  # fmt: skip
    say(markdown(texts))


def findings(results: Results) -> list[str]:
    """Sentences computed from the rows of the topk sweep; none without rows."""
    said = []
    for n_win, part in reached(results).groupby("n_win", sort=False):
        least, most = part.iloc[0], part.iloc[-1]
        said.append(
            f"With {n_win} x {n_win} regions, topk {least['topk']} reaches {least['share']:.1%} of the tokens and topk "
            f"{most['topk']} {most['share']:.0%}; routing takes {number(100 * part['routing'].max())} % of the MACs "
            f"at most."
        )
    say(*said)
    return said
