"""New tasks: a model is cut for a task that it was never trained for, by the masks of similar tasks and by rivals.

Two grids. On Rooms each of six tasks is left out in turn: a dense model of the other five, a library of their masks,
and the sixth as the new task. With label groups a model has learnt to tell 12 garments and digits apart, the library
holds 18 groups of three of them, and five new groups are of classes that it never saw.

Every method has the same head, data, steps and learning rate; what differs is the cut. With one task SNIP's score and
CUT's are the same, so data tell them apart: SNIP sees the few pictures that similarity sees, CUT eight times as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.recipe import FIRST_RATE, FLOOR, RATE, dense, floor, following, proportional

TASKS = ("seg", "normal", "depth", "edge", "keypoint", "scene")  # of Rooms, as it lists them
FOLDER = "newtask"
SEEDS = (1, 2)
UNPRUNED, SIMILAR, RANDOM, ALL = "unpruned", "similar-tasks", "similar-tasks-random", "similar-tasks-all"
RIVALS = ("magnitude", "random", "snip", "cut")
FEW, SCALE = 4, 8  # scoring batches of similarity and SNIP, and how many times as many CUT has
MANY = FEW * SCALE
SHARES = (0.7, 0.9)  # budgets over weights
MEGABYTES = (4, 2)  # budgets over channels
BUDGETS = {**{f"{s:.0%}": s for s in SHARES}, **{f"{m} MB": m for m in MEGABYTES}}
MODELS = ("small_cnn", "small_vit")
SIDES = {"small_cnn": 32, "small_vit": 64}
GROUP_EPOCHS = {"small_cnn": 6, "small_vit": 30}  # a step of the ViT costs an eighth
BASE_EPOCHS = 10
NEIGHBOURS = {"rooms": 2, "groups": 3}  # of five library tasks, and of eighteen
_SCORER = "pruning.scorer.init_args"


def _measure(name: str, experts: bool = False) -> dict[str, Any]:
    plain: dict[str, Any] = {"class_path": f"cut.similarity.{name}"}
    if not experts:
        return plain
    return {"class_path": "experiments.experts.WithExperts", "init_args": {"similarity": plain}}


# What may say which library tasks are similar. On Rooms the default alone is run at every budget.
DEFAULT = "mask overlap"
MEASURES = {
    DEFAULT: _measure("MaskOverlap"),
    "CKA": _measure("CKA"),
    "LEEP": _measure("LEEP", experts=True),
    "gradient cosine": _measure("GradientCosine", experts=True),
}
# One change at a time to similar-task voting on Rooms, and the budgets at which it is run.
CHANGES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "CKA": (("90%",), {f"{_SCORER}.similarity": MEASURES["CKA"]}),
    "soft votes": (("90%",), {f"{_SCORER}.soft": True}),
    "all scoring pictures": (("90%",), {f"{_SCORER}.batches": MANY, "pruning.batches": MANY}),
    "ties by Taylor": (("90%", "4 MB", "2 MB"), {f"{_SCORER}.tie": "taylor"}),
}


def base(new: str, seed: int) -> Cell:
    """The dense model of all tasks of Rooms but one, with a library of its tasks' masks."""
    settings = {
        "data.init_args.tasks": [t for t in TASKS if t != new],
        "trainer.max_epochs": BASE_EPOCHS,
        "trainer.check_val_every_n_epoch": BASE_EPOCHS,
        "trainer.callbacks": [{"class_path": "experiments.experts.FillLibrary"}],
    }
    return dense(seed, settings=settings)


def group_base(model: str, seed: int) -> Cell:
    """The dense model of all classes of the library's label groups, with the library."""
    from cut.data.labelgroups import groups

    name = groups().base.name
    configs = ("trainer/default", "data/labelgroups", f"model/{model}", "pruning/dense", "logger/none", "recipe/groups")
    return Cell(
        configs,
        {
            "seed_everything": seed,
            "data.init_args.seed": seed,
            "data.init_args.group": name,
            "data.init_args.side": SIDES[model],
            "pruning.tasks": [name],
            "trainer.max_epochs": GROUP_EPOCHS[model],
            "trainer.check_val_every_n_epoch": GROUP_EPOCHS[model],
            "trainer.callbacks": [{"class_path": "experiments.experts.GroupLibrary"}],
        },
    )


def adapted(method: str, task: str, budget: str | None, start: Cell, more: Mapping[str, Any] | None = None) -> Cell:
    """One run of a method on a new task.

    Args:
        method: A config under ``configs/pruning``, or :data:`UNPRUNED`.
        task: The new task, of Rooms or a label group.
        budget: One of :data:`BUDGETS`; None with :data:`UNPRUNED`.
        start: The dense model.
        more: Further options.
    """
    rooms = task in TASKS
    data, recipe = ("data/rooms", "recipe/adapt") if rooms else ("data/labelgroups", "recipe/adapt-groups")
    model = start.configs[2].removeprefix("model/")
    pruning = "pruning/dense" if method == UNPRUNED else f"pruning/{method}"
    configs = ("trainer/default", data, f"model/{model}", pruning, "logger/none", recipe)
    seed = start.seed
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "pruning.tasks": [task],
        RATE: proportional(FIRST_RATE, model),
    }
    options |= {"data.init_args.tasks": [task]} if rooms else {"data.init_args.group": task}
    if not rooms:
        options["data.init_args.side"] = SIDES[model]
    if method == UNPRUNED:
        options["method"] = UNPRUNED
    if method == "cut":
        options["pruning.batches"] = MANY
    if budget is not None:
        options |= _budget(BUDGETS[budget])
        options |= following(Cell(configs).config.get("pruning", {}), seed, None)
    if method.startswith(SIMILAR):
        units = "channels" if budget is not None and BUDGETS[budget] >= 1 else "weights"
        options |= {f"{_SCORER}.library": f"library/{units}", f"{_SCORER}.batches": FEW}
        if method != ALL:
            options[f"{_SCORER}.k"] = NEIGHBOURS["rooms" if rooms else "groups"]
    return Cell(configs, {**options, **(more or {})}, start)


def _budget(amount: float) -> dict[str, Any]:
    """Options of a budget: a share of the weights, or megabytes of a file by channels."""
    if amount < 1:
        kept = {"pruning.floor": floor(amount)} if floor(amount) != FLOOR else {}
        return {"pruning.budget.init_args.target": amount, **kept}
    target = {"class_path": "cut.limits.Bytes", "init_args": {"target": round(amount * 1e6)}}
    return {"pruning.units": "channels", "pruning.budget": target}


def _row(method: str, cells: Iterable[Sequence[Cell]], **variant: Any) -> Row:
    return Row(method, tuple(tuple(c) for c in cells), variant)


def _against(rows: Iterable[Row]) -> dict[str, Cell]:
    """Every adapted cell with the unpruned one of its start and task."""
    cells = [c for row in rows for run in row.runs for c in run]
    whole = {(c.start.id, *c.tasks): c for c in cells if c.start is not None and c.method == UNPRUNED}
    return {c.id: whole[(c.start.id, *c.tasks)] for c in cells if c.start is not None}


def newtask_grid() -> Grid:
    """Rooms, each task left out in turn."""

    def runs(method: str, budget: str | None, more: Mapping[str, Any] | None = None) -> list[list[Cell]]:
        return [[adapted(method, t, budget, base(t, s), more) for t in TASKS] for s in SEEDS]

    rows = [_row(UNPRUNED, runs(UNPRUNED, None))]
    for budget in BUDGETS:
        rows.append(_row(SIMILAR, runs(SIMILAR, budget), budget=budget, change=""))
        rows += [_row(m, runs(m, budget), budget=budget) for m in (RANDOM, ALL, *RIVALS)]
        rows += [
            _row(SIMILAR, runs(SIMILAR, budget, more), budget=budget, change=change)
            for change, (budgets, more) in CHANGES.items()
            if budget in budgets
        ]
    note = (
        f"Six tasks of Rooms, each left out in turn; MobileNetV2, the other five trained for {BASE_EPOCHS} epochs; "
        f"{NEIGHBOURS['rooms']} of 5 neighbours by {DEFAULT} (which sees 8 pictures), votes by masks of 80 % (weights) "
        "or 40 % of the bytes (channels), ties by magnitude. Similarity and SNIP see 32 pictures, CUT 256. "
        f"One rate for all, {FIRST_RATE:g}; metrics on the first 96 test pictures."
    )
    return Grid(
        "newtask",
        "A task the model was never trained for",
        tuple(rows),
        against=_against(rows),
        note=note,
        folder=FOLDER,
        by_step=True,
    )


def groups_grid() -> Grid:
    """Label groups: what measures of similarity are worth where tasks are many."""
    from cut.data.labelgroups import groups  # other tables need not wait for PyTorch

    new = [g.name for g in groups().unseen]
    rows: list[Row] = []
    for model in MODELS:

        def runs(
            method: str, budget: str | None, more: Mapping[str, Any] | None = None, model: str = model
        ) -> list[list[Cell]]:
            return [[adapted(method, t, budget, group_base(model, s), more) for t in new] for s in SEEDS]

        rows.append(_row(UNPRUNED, runs(UNPRUNED, None), model=model))
        for budget in [b for b, amount in BUDGETS.items() if amount < 1]:
            for name, measure in MEASURES.items():
                more = {} if name == DEFAULT else {f"{_SCORER}.similarity": measure}
                rows.append(_row(SIMILAR, runs(SIMILAR, budget, more), model=model, budget=budget, change=name))
            rows += [_row(m, runs(m, budget), model=model, budget=budget) for m in (RANDOM, ALL, *RIVALS)]
    note = (
        "Five new label groups of Fashion-MNIST and MNIST (3 garments each in three of them, 3 digits in two) that "
        "share no class with the 18 groups of the library, nor with what the backbone was trained on; "
        f"{NEIGHBOURS['groups']} neighbours, votes by masks of 80 %, ties by magnitude. Similarity and SNIP see 64 "
        "pictures (mask overlap 16), CUT 512. 300 training and 100 test pictures of each class. For the gradient "
        "cosine a library classifier's own most likely class stands in for a label."
    )
    return Grid(
        "newtask-groups",
        "New label groups",
        tuple(rows),
        against=_against(rows),
        note=note,
        folder=FOLDER,
        by_step=True,
    )
