"""Scores as CSV files, named and laid out as by the official DAVIS 2017 tool, and on screen."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cfbi_jax.data.image_files import write_file
from cfbi_jax.evaluation import davis, metrics, youtube_vos

DAVIS_MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
OBJECT_MEASURES = DAVIS_MEASURES[1:]
TABLE_KINDS = ("global_results", "per-sequence_results", "per-object_results")


def table_path(folder: str | Path, kind: str, split: str) -> Path:
    """Returns where a table is written; `kind` is one of `TABLE_KINDS`."""
    return Path(folder) / f"{kind}-{split}.csv"


def subset_name(split: str) -> str:
    """What the tables of some of a split's videos are called, as they are not the split's."""
    return f"{split}-subset"


def remove_tables(folder: str | Path, split: str) -> None:
    """Removes tables of an earlier run, so that one that fails leaves none behind."""
    for kind in TABLE_KINDS:
        table_path(folder, kind, split).unlink(missing_ok=True)


def write_davis_tables(scores: davis.Scores, folder: str | Path) -> list[Path]:
    """Writes the two CSV files of the official tool, and one with all statistics per object.

    `global_results-<split>.csv` and `per-sequence_results-<split>.csv` are the official ones, in
    the same bytes: values from 0 to 1, three decimals, an object named `<sequence>_<id>`.
    `per-object_results-<split>.csv` adds recall, decay and the number of scored frames.

    Returns:
      The paths written.
    """
    per_sequence = (
        (
            f"{o.sequence}_{o.object_id}",
            f"{o.region_statistics.mean:.3f}",
            f"{o.boundary_statistics.mean:.3f}",
        )
        for o in scores.objects
    )
    per_object = (
        (o.sequence, o.object_id, len(o.frames), *(f"{v:.6f}" for v in _object_values(o)))
        for o in scores.objects
    )
    values = [f"{value:.3f}" for value in _davis_values(scores)]
    return [
        _write_csv(table_path(folder, "global_results", scores.split), DAVIS_MEASURES, [values]),
        _write_csv(
            table_path(folder, "per-sequence_results", scores.split),
            ("Sequence", "J-Mean", "F-Mean"),
            per_sequence,
        ),
        _write_csv(
            table_path(folder, "per-object_results", scores.split),
            ("Sequence", "Object", "Frames", *OBJECT_MEASURES),
            per_object,
        ),
    ]


def write_youtube_vos_tables(scores: youtube_vos.Scores, folder: str | Path) -> list[Path]:
    """Writes `global_results-<split>.csv` and `per-object_results-<split>.csv`.

    Returns:
      The paths written.
    """
    values = [f"{value:.3f}" for _, value in _youtube_vos_values(scores)]
    per_object = (
        (o.sequence, o.object_id, category, len(o.frames), *(f"{v:.6f}" for v in _object_values(o)))
        for o, category in zip(scores.objects, scores.categories, strict=True)
    )
    return [
        _write_csv(
            table_path(folder, "global_results", scores.split),
            [name for name, _ in _youtube_vos_values(scores)],
            [values],
        ),
        _write_csv(
            table_path(folder, "per-object_results", scores.split),
            ("Video", "Object", "Category", "Frames", *OBJECT_MEASURES),
            per_object,
        ),
    ]


def print_davis(scores: davis.Scores, console: Console | None = None) -> None:
    """Prints the global numbers and a table per object."""
    console = console or Console()
    table = _table(
        f"DAVIS {scores.year} {scores.split}, {len(scores.objects)} objects", DAVIS_MEASURES
    )
    table.add_row(*(f"{value:.3f}" for value in _davis_values(scores)))
    console.print(table)
    per_object = _table("Per object", ("Object", *OBJECT_MEASURES))
    for o in scores.objects:
        per_object.add_row(
            escape(f"{o.sequence}_{o.object_id}"), *(f"{value:.3f}" for value in _object_values(o))
        )
    console.print(per_object)


def print_youtube_vos(scores: youtube_vos.Scores, console: Console | None = None) -> None:
    """Prints the numbers of each group, and what they assume."""
    console = console or Console()
    table = _table(
        f"YouTube-VOS layout, {scores.split}, {len(scores.objects)} objects",
        [name for name, _ in _youtube_vos_values(scores)],
    )
    table.add_row(*(f"{value:.3f}" for _, value in _youtube_vos_values(scores)))
    console.print(table)
    for group in scores.groups:
        console.print(f"{group.name}: {group.num_objects} objects")
    console.print(youtube_vos.ASSUMPTIONS)


def _davis_values(scores: davis.Scores) -> tuple[float, ...]:
    """Returns the values of `DAVIS_MEASURES`."""
    region, boundary = scores.region, scores.boundary
    return (
        scores.j_and_f,
        *(region.mean, region.recall, region.decay),
        *(boundary.mean, boundary.recall, boundary.decay),
    )


def _object_values(scores: metrics.ObjectScores) -> tuple[float, ...]:
    """Returns the values of `OBJECT_MEASURES`."""
    region, boundary = scores.region_statistics, scores.boundary_statistics
    return (
        *(region.mean, region.recall, region.decay),
        *(boundary.mean, boundary.recall, boundary.decay),
    )


def _youtube_vos_values(scores: youtube_vos.Scores) -> list[tuple[str, float]]:
    """Returns the overall number, J of each group and F of each group, with their names."""
    return [
        ("Overall", scores.overall),
        *((f"J-{group.name.capitalize()}", group.region) for group in scores.groups),
        *((f"F-{group.name.capitalize()}", group.boundary) for group in scores.groups),
    ]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        # Folded, not cut: names of one sequence's objects differ at their end.
        justify = "left" if column == "Object" else "right"
        table.add_column(column, justify=justify, overflow="fold")
    return table


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())
    return path
