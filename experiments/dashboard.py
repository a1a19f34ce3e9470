"""Dashboard: the project's W&B workspace and report as code, and committed records as W&B runs.

    python -m experiments.dashboard runs rooms              # one offline run a record, to sync when there is a network
    python -m experiments.dashboard workspace --entity me   # panels over all runs of the project
    python -m experiments.dashboard report --entity me      # the tables' figures with a few words
    python -m experiments.dashboard workspace --out w.json  # what would be sent, without a network

The last three need the extra ``dashboard``. What is shown is what records hold (:mod:`experiments.tracking`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from cut.files import write_atomically
from cut.records import Record
from experiments import results, tracking
from experiments.cell import Cell
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.refusal import refusing
from experiments.selection import select

ROOT = Path(__file__).parent.parent
# What a model costs, against Delta_m: key of the summary, title, whether the axis is logarithmic.
AXES = (
    ("sparsity/kept", "Δm against sparsity", False),
    ("model/nonzero", "Δm against non-zero parameters", True),
    ("model/macs", "Δm against multiply-accumulates", True),
    ("model/latency_ms", "Δm against latency in ms", False),
)
DELTA = "delta_m/test"
MEDIA = ("overlap_map", "layers_chart")


def metrics(records: Sequence[Record]) -> dict[str, list[str]]:
    """Task to the names of its metrics (``seg/miou``), of all records."""
    found: dict[str, list[str]] = {}
    for record in records:
        for key in record.metrics.get("test", {}):
            names = found.setdefault(key.split("/")[0], [])
            if key not in names:
                names.append(key)
    return found


def with_delta(record: Record, dense: Record | None, grid: Grid) -> Record:
    """A record with its Delta_m on the grid's split against the dense model of its seed, where that is known."""
    if dense is not None:
        own, reference = (select(r, grid.selection)[grid.split] for r in (record, dense))
        value = results.delta(own, reference, record.higher_is_better)
        if value == value:
            record.delta_m = {**record.delta_m, grid.split: value}
    return record


def runs(grid: Grid, folder: Path) -> Iterator[Record]:
    """The records that a grid has, each with its Delta_m."""
    found = results.collect(grid, folder)
    for cell in grid.cells():
        if cell.id in found:
            yield with_delta(found[cell.id], found.get(_reference(cell, grid)), grid)


def _reference(cell: Cell, grid: Grid) -> str:
    """Id of the dense cell that a cell is compared with."""
    return grid.against[cell.id].id if cell.id in grid.against else cell.start.id if cell.start else ""


def send(grid: Grid, folder: Path, project: str, entity: str | None, out: Path, online: bool) -> int:
    """One W&B run for each record of a grid, with the record as an artifact; the same record is the same run.

    Args:
        grid: Whose records.
        folder: Where they lie.
        project: On W&B.
        entity: User or team; None leaves it to W&B.
        out: Folder for W&B's own files.
        online: Whether runs go to the server now.

    Returns:
        How many runs were made.
    """
    import wandb

    found = list(runs(grid, folder))
    out.mkdir(parents=True, exist_ok=True)
    for record in track(found, description=f"{grid.name}: records"):
        run = wandb.init(
            project=project,
            entity=entity,
            id=re.sub(r"[^\w.-]", "_", record.id)[-64:],  # what W&B allows in names of artifacts
            name=record.id,
            group=grid.name,
            job_type="prune" if record.budget.get("target") is not None else "dense",
            dir=out,
            mode="online" if online else "offline",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        tracking.log_record(run, record, history=True)
        tracking.log_files(run, record, folder / f"{record.id}.json")
        run.finish()
    return len(found)


def _scatters() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(DELTA), log_x=log, regression=False)
        for x, title, log in AXES
    ]


def _curves(names: Sequence[str]) -> list[Any]:
    """How each metric of a task goes on validation over the steps, one line a method."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(title=name, x="Step", y=[f"val/{name}"], groupby=wr.Config("method"), groupby_rangefunc="stddev")
        for name in names
    ]


def workspace(entity: str, project: str, records: Sequence[Record]) -> Any:
    """The project's workspace: trade-offs, a section for each task, layers and overlap, predictions, cost.

    Args:
        entity: User or team.
        project: On W&B.
        records: Whose tasks and metrics get panels.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``; ``save()`` sends it.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section("Trade-off", panels=_scatters(), is_open=True)]
    sections += [ws.Section(f"Task: {task}", panels=_curves(names)) for task, names in metrics(records).items()]
    seconds = ["score_seconds", "finetune_seconds", "peak_memory"]
    sections += [
        ws.Section("Layers and overlap", panels=[wr.MediaBrowser(media_keys=[key]) for key in MEDIA]),
        ws.Section("Predictions", panels=[wr.WeavePanelSummaryTable(table_name="predictions")]),
        ws.Section("Cost", panels=[wr.BarPlot(title=k, metrics=[k], groupby=wr.Config("method")) for k in seconds]),
        ws.Section("Runs side by side", panels=[wr.RunComparer()]),
    ]
    columns = ["run:displayName", "config:method.value", f"summary:{DELTA}", "summary:sparsity/kept"]
    settings = ws.RunsetSettings(
        groupby=[ws.Config("method")], order=[ws.Ordering(ws.Summary(DELTA), ascending=False)], pinned_columns=columns
    )
    return ws.Workspace(entity=entity, project=project, name="cut", sections=sections, runset_settings=settings)


def report(entity: str, project: str, grids: Sequence[Grid], records: Sequence[Record]) -> Any:
    """The project's report: for every table its runs with the trade-off, then each task's curves.

    Args:
        entity: User or team.
        project: On W&B.
        grids: The tables, each a group of runs.
        records: Whose tasks and metrics get panels.

    Returns:
        A ``wandb_workspaces.reports.v2.Report``; ``save()`` sends it.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panels(name: str, found: Sequence[Any]) -> Any:
        # No entity and project: those of the report itself, without asking the server.
        runset = wr.Runset(name=name, filters=[ws.Metric("Group") == name])
        return wr.PanelGrid(runsets=[runset], panels=list(found))

    blocks: list[Any] = [
        wr.P(
            "Multi-task models cut for chosen tasks. Δm in percent, positive is better: the mean over tasks of the "
            "mean relative change of their metrics against the dense model of the same seed."
        ),
        wr.TableOfContents(),
    ]
    for grid in grids:
        blocks += [wr.H1(grid.title), wr.P(grid.note or "Means and spread over seeds are in docs/tables.")]
        blocks.append(panels(grid.name, _scatters()))
    for task, names in metrics(records).items():
        blocks += [wr.H1(f"Task: {task}"), panels(grids[0].name, _curves(names))]
    return wr.Report(entity=entity, project=project, title="cut: the benchmark", blocks=blocks, width="fluid")


def specification(view: Any) -> str:
    """What would be sent, as JSON."""
    model = view._to_model()
    return json.dumps(json.loads(model.model_dump_json(by_alias=True, exclude_none=True)), indent=1) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.dashboard", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("runs", "workspace", "report"))
    parser.add_argument("grids", nargs="*", default=["rooms"], help=f"of {', '.join(GRIDS)}; default rooms")
    parser.add_argument("--entity", help="user or team on W&B")
    parser.add_argument("--project", default=tracking.PROJECT)
    parser.add_argument("--records", type=Path, default=ROOT / "experiments/records/rooms")
    parser.add_argument("--out", type=Path, help="runs: W&B's folder (runs/wandb); else a file for what would be sent")
    parser.add_argument("--online", action="store_true", help="runs: send them now instead of keeping them offline")
    return parser.parse_args(argv)


def _view(args: argparse.Namespace, grids: Sequence[Grid]) -> None:
    """Build the workspace or the report, and send it or write what would be sent.

    Raises:
        ValueError: If the extra is missing, or there is no entity, or the server cannot be had.
    """
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError("workspaces and reports need the extra 'dashboard': pip install 'cut[dashboard]'") from error
    if args.entity is None and args.out is None:
        raise ValueError("no entity; give --entity, your user or team on W&B, or --out FILE to look without a network")
    if args.out is None:
        import wandb

        reason = tracking.why_offline(wandb.setup().settings.base_url)
        if reason is not None:
            raise ValueError(f"W&B: {reason}; --out FILE writes what would be sent")
    found = [r for grid in grids for r in results.collect(grid, args.records).values()]
    entity = args.entity or "entity"
    view = (
        workspace(entity, args.project, found)
        if args.what == "workspace"
        else report(entity, args.project, grids, found)
    )
    if args.out is not None:
        write_atomically(args.out, specification(view))
        print(args.out)
    else:
        print(view.save().url)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    args = parse(argv)
    unknown = [g for g in args.grids if g not in GRIDS]
    if unknown:
        raise ValueError(f"no grid {unknown[0]!r}; allowed: {', '.join(GRIDS)}")
    grids = [GRIDS[name]() for name in args.grids]
    if args.what != "runs":
        _view(args, grids)
        return 0
    out = args.out or ROOT / "runs/wandb"
    count = sum(send(g, args.records, args.project, args.entity, out, args.online) for g in grids)
    print(f"{count} runs" + ("" if args.online else f" kept offline; upload them with: wandb sync {out}/wandb/*"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
