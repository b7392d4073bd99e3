"""Scores as CSV files, named and laid out as by the official DAVIS 2017 tool, and on screen."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cfbi_jax.evaluation import davis, metrics, youtube_vos
from cfbi_jax.files import write_file

DAVIS_MEASURES = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
OBJECT_MEASURES = DAVIS_MEASURES[1:]
TABLE_KINDS = ("global_results", "per-sequence_results", "per-object_results")

Scores = davis.Scores | youtube_vos.Scores
# Kind, header, rows.
CsvTable = tuple[str, Sequence[str], list[Sequence[object]]]


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


def write_tables(scores: Scores, folder: str | Path, name: str) -> list[Path]:
    """Writes the CSV files of DAVIS' or YouTube-VOS' scores, and returns their paths.

    DAVIS: `global_results-<name>.csv` and `per-sequence_results-<name>.csv` are those of the
    official tool, in the same bytes: values from 0 to 1, three decimals, an object named
    `<sequence>_<id>`. `per-object_results-<name>.csv` adds recall, decay and the number of scored
    frames. YouTube-VOS: the first, with the means of its groups, and the last.
    """
    if isinstance(scores, youtube_vos.Scores):
        tables = _youtube_vos_tables(scores)
    else:
        tables = _davis_tables(scores)
    return [
        _write_csv(table_path(folder, kind, name), header, rows) for kind, header, rows in tables
    ]


def show(scores: Scores, name: str, console: Console | None = None) -> None:
    """Prints the means, called `name`; for DAVIS a table per object, for YouTube-VOS what the
    numbers assume."""
    console = console or Console()
    if isinstance(scores, youtube_vos.Scores):
        _show_youtube_vos(scores, name, console)
    else:
        _show_davis(scores, name, console)


def _davis_tables(scores: davis.Scores) -> list[CsvTable]:
    per_sequence = [
        (
            f"{o.sequence}_{o.object_id}",
            f"{o.region_statistics.mean:.3f}",
            f"{o.boundary_statistics.mean:.3f}",
        )
        for o in scores.objects
    ]
    per_object = [
        (o.sequence, o.object_id, len(o.frames), *(f"{v:.6f}" for v in _object_values(o)))
        for o in scores.objects
    ]
    values = [f"{value:.3f}" for value in _davis_values(scores)]
    return [
        ("global_results", DAVIS_MEASURES, [values]),
        ("per-sequence_results", ("Sequence", "J-Mean", "F-Mean"), per_sequence),
        ("per-object_results", ("Sequence", "Object", "Frames", *OBJECT_MEASURES), per_object),
    ]


def _youtube_vos_tables(scores: youtube_vos.Scores) -> list[CsvTable]:
    names, values = zip(*_youtube_vos_values(scores), strict=True)
    per_object = [
        (o.sequence, o.object_id, category, len(o.frames), *(f"{v:.6f}" for v in _object_values(o)))
        for o, category in zip(scores.objects, scores.categories, strict=True)
    ]
    header = ("Video", "Object", "Category", "Frames", *OBJECT_MEASURES)
    return [
        ("global_results", names, [[f"{value:.3f}" for value in values]]),
        ("per-object_results", header, per_object),
    ]


def _show_davis(scores: davis.Scores, name: str, console: Console) -> None:
    table = _table(f"DAVIS {scores.year} {name}, {len(scores.objects)} objects", DAVIS_MEASURES)
    table.add_row(*(f"{value:.3f}" for value in _davis_values(scores)))
    console.print(table)
    per_object = _table("Per object", ("Object", *OBJECT_MEASURES))
    for o in scores.objects:
        per_object.add_row(
            escape(f"{o.sequence}_{o.object_id}"), *(f"{value:.3f}" for value in _object_values(o))
        )
    console.print(per_object)


def _show_youtube_vos(scores: youtube_vos.Scores, name: str, console: Console) -> None:
    names, values = zip(*_youtube_vos_values(scores), strict=True)
    table = _table(f"YouTube-VOS layout, {name}, {len(scores.objects)} objects", names)
    table.add_row(*(f"{value:.3f}" for value in values))
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


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())
    return path
