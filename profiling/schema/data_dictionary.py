"""Every column explained: ``python -m profiling.schema.data_dictionary > results/README.md``."""

from profiling.schema.capability import CAPABILITY
from profiling.schema.row import ROW
from profiling.schema.table import Schema


def dictionary(schema: Schema = ROW) -> str:
    """The data dictionary, as Markdown, generated from the schema."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for name, column in schema.model.to_schema().columns.items():
        kind = {"int64": "integer", "float64": "number", "boolean": "true/false"}.get(str(column.dtype).lower(), "text")
        lines.append(f"| `{name}` | {kind} | {column.description} |")
    return "\n".join(lines) + "\n"


README = """# Results

One folder per device, one CSV per sweep in it, one row per cell: one case, measured once. The files of all sweeps but
`capability*.csv`, which have columns of their own (last on this page), have the
same columns, so they concatenate: `profiling.schema.row.load("results/<device>/topk.csv", ...)` gives one typed
pandas table. An empty cell was not obtained or does not apply; it never stands for zero.

- A row's key is every column from `sweep` to `device_name`. A rerun skips keys that have a row.
- `peaks.csv` beside the sweeps holds the device's own peaks, measured once: FLOP/s of a large matrix product
  by dtype, and bytes per second of a large copy, read plus written.
- `report.html` beside the sweeps shows all of them on one page that opens offline; every run writes it anew, and
  `python -m notebooks.report results/<device>` does so from the files alone.
- `explorer.html` here ranks the attentions of all devices for a shape and a budget; every run writes it anew, and
  `python -m notebooks.explorer results` does so from the files alone.
- `predictions.json` holds the closed forms of memory and MACs that the explorer evaluates (`python -m ablations
  lattice`). CPU kernels take other scratch with other vector instructions: its memory of CPUs is that of AVX-512, as on
  the Xeon. With AVX2, as on the EPYC, training of `pseudo_conv` takes 1.2 MB less at dim 64: of 2.0 MB at 14 x 14 and
  of 6.5 at 56 x 56.
- `figures/` and `tables/` are written by the notebooks, from these files alone. `profile_one_config.json` is what
  the profiler said of the one configuration in the notebook of that name.
- `capability*.csv` hold accuracies, one row per training: `profiling.schema.capability.load(...)`. Three seeds are
  three rows; `profiling.schema.capability.summary` gives their mean and range.
- `published_models.csv` holds figures from papers, in columns named `published_*`. None of them was measured here.

`memory_predicted_bytes` is empty under torch.compile, which fuses steps away, and for bf16 and fp16 on a CPU, whose
kernels work on copies that no rule covers.

## State of these results

- `amd-epyc-family-26-model-2-2-threads` (with AVX-512): every sweep, of 25 attentions. All but `capability*` were
  measured on 2026-11-29, three processes a case, one in `stl`. Nothing else ran there, but the host is shared, and
  had two speeds for minutes at a time: of three processes of `resolution` the slowest took 1.18 times as long as the
  fastest in the median case, and 1.36 times in the upper quartile. Differences below a third between single cells
  need `compare --interleave`. `macs_fvcore` of `aggregated` and `quadtree` was counted again afterwards, since the
  trace had been of another computation, or failed. `capability` is of 25 attentions, 6 tasks and 3 seeds, from before
  CPUs were named by family: its times per step are of CPUs of either kind. The steps of `recall` (500, 800, then
  1200), `count` (600, then 900), `offset` (700, then 1000) and `match_digits` (1200, then 2000) were raised until
  full attention learned them with every seed; `capability_pilot` is of the first steps. `connect` is not learned by
  full attention, and better by a convolution (90 %): it does not measure what it is for. Some trainings, such as
  those of `linear` and `dilated` at `recall`, leave the plateau late or not at all: see the range over seeds.
- `amd-epyc-2-threads`, a CPU without AVX-512 whose hypervisor hides the rest: `resolution` of 15 attentions,
  `kv_downsample`, `models` and `bra_speed`. Other programs used the machine: ratios within a sweep are usable, single
  latencies are not. Rows of other attentions and sweeps were here that are of another kind of AMD EPYC; they are
  removed, and measured again in the folder above.
- `intel-xeon-2-threads`: every sweep but `capability*`, of 17 attentions; three processes or more for each timed cell,
  but one in `stl` and `complexity` and two in 13 cells of `precision`. `bra_speed` is of an earlier version of
  `impl="sdpa"`. In `stl`, `dilated` was measured with an interval of 2 in every stage, which is now 8, 4, 2, 1;
  `cross_shaped` had the halves of its heads in the other order, which matters on oblong grids. `quadtree` and
  `deformable` had other defaults: `quadtree` 3 levels, averaged values, neither LePE nor a bias of qkv; `deformable` a
  stride of 2 (in `stl` 8, 4, 2, 1), other points and offsets, one group, no position bias.
- In the other folders, `macs_backward_counted` and what follows from it (`achieved_tflops`, `arithmetic_intensity`,
  `roofline_fraction`) were computed again on 2026-11-29. PyTorch's counter had overstated depthwise convolutions: a
  training step of BRA up to 3.1 times, of BiFormer 1.6 to 2 times. For that reason some training rows near a sweep's
  limit of MACs are predicted only.
- `nvidia-h100-80gb-hbm3`: `bra_speed` and `topk` are whole. Parts of `models` and `kv_downsample` are there;
  `resolution`, `precision` and `stl` are not measured yet. One process a cell. The kernels of `impl="triton"` have
  changed since. Predictions were computed again on 2026-11-29 by mended rules, except for training by
  `impl="triton"`; those of `auto` in training are of the new kernels, and up to 16 % above the peak measured with the
  old ones. All others are within 1 % of the measured peak, but `triton` forward at 600 x 500 (5 % more). The rules
  for what kernels allocate on CUDA (`profiling/meters/cuda_scratch.py`) are PyTorch's, and were found with these rows:
  another card's are yet to test them.

## Units

MACs are multiply-accumulates (what papers and fvcore call FLOPs); FLOPs = 2 x MACs. Bytes are bytes; figures
show MiB. This page is generated: `python -m profiling.schema.data_dictionary > results/README.md`.

## Columns

"""
TRAINED = """
## Columns of capability sweeps

"""


def page() -> str:
    """The whole page."""
    return README + dictionary() + TRAINED + dictionary(CAPABILITY)


if __name__ == "__main__":
    print(page(), end="")
