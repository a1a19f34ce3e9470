"""Page: the benchmark or one comparison as plain JSON, and that JSON as one HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
from rich.progress import track

from cut.drawing import PALETTE
from cut.files import write_atomically
from cut.records import Record
from experiments import delivery, papers, plots
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.report import comparison, delivered, table
from experiments.report.table import Json, Source
from experiments.results import collect
from experiments.tables import records as demo_records

HERE = Path(__file__).parent
STYLE = "page.css"
SCRIPTS = ("theme.js", "table.js", "charts.js", "page.js")
# The plots' colours on a dark page: the same hues as plots.PALETTE, lighter.
DARK = ("#5AB0E8", "#F58A4B", "#35C79B", "#E7A5CB", "#F2BC45", "#9AD4F5", "#E6E9EC")
FIRST = ("rooms", "methods", "recovery", "fusion", "subsets", "backbones", "edge", "channels", "changes", "rates")

DEFINITIONS = [
    (
        "Sparsity",
        "zeros / weights of convolutions and linear layers of the backbone and the kept heads. Dropped heads are not "
        "counted.",
    ),
    (
        "Δm",
        "mean over the kept tasks of the mean signed relative change of the task's metrics, in percent, against the "
        "dense record of the same seed on the same tasks; positive is better. Then mean ± sample standard deviation "
        "over seeds.",
    ),
    (
        "Δm bounded",
        "the same with each metric's change clipped to ±100 %, so that one metric near zero in the dense model cannot "
        "decide it.",
    ),
    (
        "Δm vs longer",
        "the same against dense-longer: the dense model trained for the extra steps that a cut model has for its "
        "recovery. It tells what is lost by the cut from what is gained by more training.",
    ),
    (
        "Selection",
        "a table reports the last epoch of every run, unless its caption says otherwise. Nothing is chosen on test, "
        "except where a caption says that the published protocol does so.",
    ),
    ("Bold", "the best of its sparsity, tasks and backbone, by more than its and the next best's standard deviation."),
    (
        "Metrics",
        "corrected ones over the whole set: mIoU from one confusion matrix over the classes in the labels, angles "
        "between unit normals, depth errors over pixels of known depth. Those named legacy are computed as the "
        "published codes do.",
    ),
    ("On disk", "description and tensors; tensors with many zeros are stored as bit mask and values."),
    ("MACs", "multiply-accumulates in convolutions and matrix products for one picture; zeros inside a layer count."),
]


def _swept(grid: str) -> Source:
    """Where the records of a grid on Rooms are."""

    def command(run: str, again: bool) -> str:
        return f"python -m experiments.sweep {grid} --only '{run}'" + " --records runs/again" * again

    return Source("Rooms", "experiments/records/rooms", command)


def _published(name: str, stand_in: bool, small: bool) -> Source:
    """Where the records of a published set, or of rooms in its layout, are."""
    line = f"python -m experiments.published {name}" + " --small" * small
    line += "" if stand_in and small else " --data /path"
    group = "Rooms written in published layouts" if stand_in else papers.SETS[name].name
    return Source(group, f"experiments/records/{papers.folder(name, stand_in)}", lambda run, again: line)


def grids(root: Path) -> list[tuple[Grid, Source]]:
    """Every grid that can have records, the main one first: on Rooms, then rooms in the published layouts."""
    order = [*(n for n in FIRST if n in GRIDS), *(n for n in GRIDS if n not in FIRST)]
    found = [(GRIDS[name](), _swept(name)) for name in order]
    for name in papers.SETS:
        for stand_in in (False, True):
            if any((root / papers.folder(name, stand_in)).glob("*.json")):
                for small in (False, True):
                    source = _published(name, stand_in, small)
                    found += [(papers.grid(name, recipe, stand_in, small), source) for recipe in papers.RECIPES]
    return found


def benchmark(root: Path, progress: bool = False) -> Json:
    """Everything that the committed records tell, as plain JSON.

    Args:
        root: ``experiments/records``.
        progress: Show a bar.

    Returns:
        ``title``, ``lead``, ``facts``, ``story``, ``tables`` (:func:`experiments.report.table.of_grid`), ``cost``
        (the demo's, timed in turns), ``delivered`` (ids of the tables of measured files) and ``how``.

    Raises:
        ValueError: If a record is damaged.
    """
    tables: list[Json] = []
    used: dict[str, Record] = {}
    todo = grids(root)
    for grid, source in track(todo, "reading records", transient=True, disable=not progress):
        records = collect(grid, root / Path(source.folder).name)
        own = [c.id for row in grid.rows for run in row.runs for c in run]
        if any(name in records for name in own):
            tables.append(table.of_grid(grid, records, source))
            used |= records
        if grid.by_file:
            measured = delivery.collect(grid, root / "delivery")
            if found := delivered.table(grid, records, measured, source):
                tables.append(found)
    cost: Json | None = None
    if any((root / "demo").glob("*.json")):
        dense, pruned = demo_records(root / "demo")
        tables.append(comparison.table(dense, pruned, demo_source()))
        used |= {r.id: r for r in (dense, *pruned)}
        cost = {"table": "demo", "note": comparison.timing(dense, pruned)}
    return {
        "kind": "benchmark",
        "title": "Cutting multi-task models: the benchmark",
        "lead": "How much of a multi-task model can be cut before its tasks suffer? Every method under one recipe, "
        "every number from a committed record.",
        "facts": headline(tables, len(used)),
        "story": benchmark_story(tables),
        "tables": tables,
        "cost": cost,
        "delivered": [t["id"] for t in tables if t["id"].endswith("-files")],
        "how": [*DEFINITIONS, *made(list(used.values()))],
    }


def demo_source(folder: str = "experiments/records/demo") -> Source:
    """Where the demo's records are."""
    return Source("Demo", folder, lambda run, again: "make demo")


def one_comparison(dense: Record, pruned: Sequence[Record], note: str = "", folder: str = "runs/demo/records") -> Json:
    """One comparison, the demo's, as plain JSON like :func:`benchmark`'s."""
    kept = (pruned[0] if pruned else dense).tasks
    names = comparison.listed([comparison.NAMES.get(t, t) for t in kept])
    found = comparison.table(dense, pruned, demo_source(folder))
    return {
        "kind": "demo",
        "title": f"One model for {len(dense.tasks)} tasks, cut down to {len(kept)}",
        "lead": f"A device needs {names}. What is left of the model when the rest is cut, and what each task lost.",
        "facts": comparison.facts(dense, pruned),
        "story": comparison.story(dense, pruned, note),
        "tables": [found],
        "cost": {"table": "demo", "note": comparison.timing(dense, pruned)},
        "delivered": [],
        "how": [*DEFINITIONS, *made([dense, *pruned])],
    }


def headline(tables: Sequence[Json], records: int) -> list[Json]:
    """The best row at each sparsity of the first table, and how many records there are."""
    if not tables:
        return []
    rows = [r for r in tables[0]["rows"] if r["y"] is not None and r["level"]]
    missing = sum(run["missing"] != [] for t in tables for r in t["rows"] for run in r["runs"])
    found: list[Json] = []
    for level in sorted({r["level"] for r in rows}):
        here = [r for r in rows if r["level"] == level]
        best = max(here, key=lambda r: r["y"])
        seeds = f"{best['seeds']} seed{'s' * (best['seeds'] != '1')}"
        text = f"Δm at {best['heading']} sparsity: {best['label']}, the best of {len(here)} methods, {seeds}"
        found.append({"value": f"{best['cells']['delta_m']['t']} %", "text": text})
    text = f"records in {len(tables)} tables; {missing} planned runs have none yet and are shown as missing"
    return [*found, {"value": str(records), "text": text}]


def benchmark_story(tables: Sequence[Json]) -> list[str]:
    """What the page is, in paragraphs."""
    return [
        "Every method starts from the same dense model of its seed and has the same data, steps, optimiser, floor and "
        "exact budget; its learning rate is chosen on validation. Δm is the mean change of the kept tasks' metrics in "
        "percent: 0 is as good as the dense model, positive is better.",
        "Choose a table; search, filter and sort it; open a row to see the runs behind it and the command that makes "
        "them again. The plots below show the rows that the filters leave.",
    ]


def made(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Seeds, machines and commits of some records."""
    if not records:
        return []
    seeds = sorted({r.seed for r in records})
    machines = list(dict.fromkeys(table.machine(r) for r in records if r.machine))
    commits = sorted({f"{r.commit[:10]}{'+' if r.dirty else ''}" for r in records})
    dirty = " A + behind a commit: there were changes on top of it." if any(r.dirty for r in records) else ""
    times = sorted(r.time for r in records if r.time)
    found = [
        (
            "Seeds",
            f"{', '.join(map(str, seeds))}: of data order, augmentation and scoring; each has its own dense model.",
        )
    ]
    if machines:
        found.append(("Machine", "; ".join(machines)))
    found.append(("Commits", f"{', '.join(commits)}.{dirty}"))
    if times:
        found.append(("Runs ended", f"{times[0][:10]} to {times[-1][:10]}"))
    return found


def plotly_source() -> str:
    """The plotting library's script out of the installed package.

    Raises:
        ValueError: If plotly is not installed.
    """
    spec = find_spec("plotly")
    places = (spec.submodule_search_locations if spec else None) or []
    found = next((p for place in places if (p := Path(place) / "package_data/plotly.min.js").is_file()), None)
    if found is None:
        raise ValueError("the report needs plotly: pip install -e '.[report]'")
    return found.read_text(encoding="utf-8")


def embedded(page: Json) -> str:
    """JSON for the inside of a script element: no text in it can end the element."""
    return json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def render(
    page: Json,
    gallery: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    library: Callable[[], str] = plotly_source,
) -> str:
    """The HTML of a page.

    Args:
        page: From :func:`benchmark` or :func:`one_comparison`.
        gallery: From :func:`experiments.report.pictures.gallery`.
        classes: Names for the segmentation's legend.
        files: Names of files beside the page and what they are.
        library: Gives the plotting library's script.

    Raises:
        ValueError: If a number is not finite, or plotly is not installed.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    legend = [(n.replace("_", " "), "rgb({},{},{})".format(*PALETTE[i])) for i, n in enumerate(classes)]
    return environment.get_template("page.html.j2").render(
        page=page,
        data=embedded({k: page[k] for k in ("kind", "tables", "cost", "delivered")}),
        gallery=gallery,
        classes=legend,
        files=dict(files or {}),
        names=comparison.NAMES,
        colours=list(zip(plots.PALETTE, DARK, strict=True)),
        style=(HERE / STYLE).read_text(encoding="utf-8"),
        script="\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        plotly=library(),
    )


def write(path: Path, page: Json, **options: Any) -> Path:
    """Write :func:`render`'s HTML, whole or not at all."""
    write_atomically(path, render(page, **options))
    return path
