"""The page that ``python -m profiling`` prints for one configuration."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiling.cases.case import Case

MIB = 2**20
BAR = 20
"""Characters of the bar for a whole step."""


def show(case: Case, row: dict[str, Any], parts: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Print cost, memory, latency, stages and heaviest operators; a missing number is a dash.

    Args:
        parts: stages and operators from :func:`operator_times.breakdown`; empty if missing.
    """
    console.print(f"[bold]{escape(str(case))}[/bold]")
    device = f"{row['device_name']}; PyTorch {row['torch']}; impl {row.get('impl') or '-'}"
    console.print(device, highlight=False, markup=False)
    if row["status"] != "ok":
        console.print(f"[bold red]{row['status']}[/bold red]: {escape(row['reason'])}", highlight=False)
    console.print(_cost(row))
    console.print(_memory(row))
    console.print(_latency(row))
    if parts.get("stages"):
        console.print(_stages(parts["stages"], console.options.ascii_only))
    if parts.get("heaviest_operators"):
        console.print(_operators(parts["heaviest_operators"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", width=78, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        left = number == 0 or column in ("note", "")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _cost(row: dict[str, Any]) -> Table:
    table = _table("Cost of the forward pass", "what", "count", "note")
    table.add_row("parameters", _whole(row.get("params")), "")
    table.add_row("MACs, by formula", _whole(row.get("macs_analytic")), "the module's own")
    for part in ("projection", "routing", "attention", "local_conv"):
        if row.get(f"macs_{part}"):
            share = 100 * row[f"macs_{part}"] / row["macs_analytic"]
            table.add_row(f"  {part.replace('_', ' ')}", _whole(row[f"macs_{part}"]), f"{share:.1f} %")
    table.add_row("MACs, counted", _whole(row.get("macs_counted")), _agreement(row.get("macs_agree")))
    table.add_row("MACs, fvcore", _whole(row.get("macs_fvcore")), "papers' convention")
    if row.get("macs_backward_counted"):
        table.add_row("MACs of the backward pass", _whole(row["macs_backward_counted"]), "counted")
    keys = row.get("kv_tokens_per_query")
    table.add_row("keys per query", "-" if keys is None else f"{keys:,.6g}", "")
    return table


def _memory(row: dict[str, Any]) -> Table:
    table = _table("Memory of one step", "what", "MiB", "note")
    predicted, peak = row.get("memory_predicted_bytes"), row.get("memory_peak_bytes")
    table.add_row("before the step", _mib(row.get("memory_base_bytes")), "weights, input, output gradient")
    table.add_row("peak, predicted", _mib(predicted), "")
    off = f"prediction off by {100 * (predicted / peak - 1):+.2f} %" if predicted and peak else ""
    table.add_row("peak, measured", _mib(peak), off)
    if row.get("memory_reserved_bytes"):
        table.add_row("reserved", _mib(row["memory_reserved_bytes"]), "held by the allocator")
    return table


def _latency(row: dict[str, Any]) -> Table:
    table = _table("Latency of one step", "what", "ms", "note")
    interval = f"95 % interval {row['latency_low_ms']:.3f} to {row['latency_high_ms']:.3f}" if _timed(row) else ""
    table.add_row("median", _ms(row.get("latency_p50_ms")), interval)
    table.add_row("quartiles", f"{_ms(row.get('latency_p25_ms'))} / {_ms(row.get('latency_p75_ms'))}", "")
    stop = f"{row['latency_samples']} samples, {row['latency_stop'].replace('_', ' ')}" if _timed(row) else ""
    table.add_row("95th percentile", _ms(row.get("latency_p95_ms")), stop)
    if row.get("device_time_p50_ms"):
        table.add_row("on the device", _ms(row["device_time_p50_ms"]), f"wall / device {row['launch_bound']:.2f}")
    if row.get("system_share") is not None:
        kept = f"freed memory is {row['freed_memory']}" if row.get("freed_memory") else ""
        table.add_row("in the system", f"{100 * row['system_share']:.0f} %", kept)
    if row.get("compile_ms"):
        table.add_row("compilation", _ms(row["compile_ms"]), "first call")
    return table


def _timed(row: dict[str, Any]) -> bool:
    return row.get("latency_p50_ms") is not None


def _stages(stages: list[dict[str, Any]], ascii_only: bool) -> Table:
    table = _table("Stages of one step, under the profiler", "stage", "forward ms", "backward ms", "share", "")
    for stage in stages:
        share, times = stage["share"], (stage["forward_ms"], stage["backward_ms"])
        table.add_row(escape(stage["name"]), *map(_ms, times), f"{100 * share:.1f} %", _bar(share, ascii_only))
    rest = max(0.0, 1 - sum(stage["share"] for stage in stages))
    table.add_row("the rest", "", "", f"{100 * rest:.1f} %", _bar(rest, ascii_only))
    return table


def _bar(share: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(BAR * share)
    whole, eighths = divmod(round(8 * BAR * share), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _operators(operators: list[dict[str, Any]]) -> Table:
    table = _table("Heaviest operators", "operator", "calls", "self ms", "share")
    for operator in operators:
        share = f"{100 * operator['share']:.1f} %"
        table.add_row(escape(operator["name"]), f"{operator['calls']:g}", f"{operator['self_ms']:.3f}", share)
    return table


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.2f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}"


def _agreement(agree: bool | None) -> str:
    return {True: "counts agree", False: "COUNTS DISAGREE", None: ""}[agree]
