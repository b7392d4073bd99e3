"""Rows of figures as tables on the terminal and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Limits, Program, Times
from cfbi_jax.files import write_file

Row = dict[str, Any]
PLAIN_WIDTH = 180
# What is written elsewhere in the table, or in the JSON file alone.
HIDDEN = ("section", "name", "details", "bound")


def make_row(
    section: str,
    name: str,
    times: Times | None = None,
    program: Program | None = None,
    limit: tuple[float, str] | None = None,
    **figures: Any,
) -> Row:
    """One line. `limit`: the least seconds for the same work, and what sets them."""
    row: Row = {"section": section, "name": name}
    if program:
        row["compile_seconds"] = program.compile_seconds
    if times:
        row["seconds"] = dataclasses.asdict(times)
    if times and limit:
        row["limit_seconds"], row["bound"] = limit
        row["share_of_limit"] = limit[0] / times.median
    if program:
        row["memory_mib"] = program.memory_mib
    return row | figures


def print_report(command: str, machine: Row, limits: Limits | None, rows: Sequence[Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)  # a file's lines need not fit a window
    print_machine(console, command, machine, limits)
    for section, own in groupby(rows, key=lambda row: row["section"]):
        console.print(_table(section, list(own)))


def print_machine(console: Console, command: str, machine: Row, limits: Limits | None) -> None:
    parts = [machine["cpu"], f"{machine['cores']} cores", f"load {machine['load_average']:.1f}"]
    if machine["platform"] != "cpu":
        parts.append(f"{machine['devices']} x {machine['device']}")
    console.print(f"{command}: {', '.join(parts)}, JAX {machine['jax']}", highlight=False)
    if limits:
        rates = [f"{dtype} product {rate / 1e9:.0f} GFLOP/s" for dtype, rate in
                 limits.products.items()]  # fmt: skip
        rates.append(f"copy {limits.copies / 1e9:.1f} GB/s")
        console.print("limits measured in this run: " + ", ".join(rates), highlight=False)
    for name, mib in machine.get("peak_memory", {}).items():
        console.print(f"peak memory, {name.removesuffix('_mib')}: {mib:.0f} MiB", highlight=False)


def _table(title: str, rows: Sequence[Row]) -> Table:
    cells = [_cells(row) for row in rows]
    columns = list(dict.fromkeys(column for line in cells for column in line))
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for line in cells:
        table.add_row(*(line.get(column, "") for column in columns))
    return table


def _cells(row: Row) -> dict[str, str]:
    cells = {"what": row["name"]}
    for name, value in row.items():
        if name in HIDDEN:
            continue
        if name == "seconds":
            unit, scale = ("s", 1) if value["median"] >= 1 else ("ms", 1e3)
            low, middle, high = (value[key] * scale for key in ("min", "median", "max"))
            cells["median"] = f"{_number(middle)} {unit}"
            cells["min - max"] = f"{_number(low)} - {_number(high)}"
        elif name == "limit_seconds":
            cells["limit"] = f"{_number(value * 1e3)} ms ({row['bound']})"
        elif name == "compile_seconds":
            cells["compile"] = f"{value:.1f} s"
        elif name == "memory_mib":
            cells["temp MiB"] = _number(value.get("temporary", ""))
        else:
            cells[name.replace("_", " ")] = _number(value)
    return cells


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_json(
    path: Path,
    command: Sequence[str],
    machine: Row,
    limits: Limits | None,
    rows: Sequence[Row],
) -> None:
    """Writes {"command": ..., "machine": ..., "rows": ...}; the limits are the machine's."""
    machine = machine | {"limits": dataclasses.asdict(limits) if limits else None}
    content = {"command": list(command), "machine": machine, "rows": list(rows)}
    write_file(path, json.dumps(content, indent=1).encode())
