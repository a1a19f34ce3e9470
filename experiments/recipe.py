"""Recipe: the cells of the benchmark on Rooms, all with the same dense model, data, steps, optimiser and floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from experiments.cell import CONFIGS, Cell

KEPT = ("seg", "normal", "depth")
SEEDS = (1, 2, 3)
RATES = (3e-4, 1e-3, 3e-3)
FIRST_RATE = RATES[1]
# Epochs of dense training, where the recipe's would take too long on two cores.
EPOCHS = {"efficientnet_lite0": 15, "resnet18": 40, "vit_small": 15}
# What a model is trained with besides the recipe. The ViT has a fixed grid of patches, to which a crop would be
# enlarged, so its crop is the whole picture; its backbone hardly learns in dense training, but once cut it has to.
TRAINING: dict[str, dict[str, Any]] = {"vit_small": {"data.init_args.augmentation.crop": [96, 128]}}
RECOVERY: dict[str, dict[str, Any]] = {"vit_small": {"model.init_args.backbone_rate": 0.1}}
FLOOR = 0.05
MODEL = "mobilenetv2"
RATE = "model.init_args.optimizer.init_args.lr"
# Methods that take the learning rates of the one that they vary.
VARIES = {
    **dict.fromkeys(("random-erk", "random-channels"), "random"),
    **dict.fromkeys(("magnitude-uniform", "magnitude-reconstructed", "magnitude-plus"), "magnitude"),
    **dict.fromkeys(("rigl", "adapmtl", "group-norm"), "magnitude"),
    **dict.fromkeys(("separate", "joint"), "snip"),
    **dict.fromkeys(("taylor-per-task", "group-taylor", "fisher"), "taylor"),
    **dict.fromkeys(("snip-init", "lth-early", "scratch"), "lth"),
    **dict.fromkeys(("disparse-pt-gradient", "disparse-dynamic"), "disparse-pt"),
    **dict.fromkeys(("cut-majority", "cut-intersection", "cut-mean", "cut-max", "cut-weighted", "cut-falling"), "cut"),
    # Two names of one rule: CUT with squared scores.
    **dict.fromkeys(("fisher-per-task", "cut-squared"), "cut"),
    **dict.fromkeys(("cut-reference", "cut-per-layer", "cut-gradual", "cut-iterative"), "cut"),
    **dict.fromkeys(("cut-recalibrated", "cut-distilled", "cut-towers", "cut-reconstructed"), "cut"),
    **dict.fromkeys(("cut-channels", "cut-channels-plus", "cut-channels-weights"), "cut"),
    **dict.fromkeys(("taps", "rcm"), "dense-longer"),
    **dict.fromkeys(("merge-then-cut", "cut-then-merge"), "cut"),
    **dict.fromkeys(("similar-tasks", "similar-tasks-all", "similar-tasks-random"), "cut"),
}
# Options that follow the budget or the run's seed wherever a method's config has them.
FOLLOW_TARGET, FOLLOW_SEED = ("final", "final_sparsity"), ("seed",)


@cache
def rates() -> dict[str, dict[float, float]]:
    """Method to sparsity to the learning rate chosen on validation (``python -m experiments.rates``)."""
    return dict(yaml.safe_load((CONFIGS / "recipe/rates.yaml").read_text()) or {})


def rate_of(method: str, sparsity: float | None) -> float:
    """The learning rate of a method: chosen at this sparsity or the next lower one that has a choice.

    A method without a choice of its own has that of the one it varies; one that varies none has the middle rate.
    """
    found = rates().get(VARIES.get(method, method), {})
    below = [s for s in found if s <= (sparsity or 0.0)]
    return found[max(below)] if below else next(iter(found.values()), FIRST_RATE)


def proportional(rate: float, model: str) -> float:
    """A learning rate chosen for MobileNetV2, for another model: in the proportion of their dense training's rates.

    Example:
        >>> proportional(1e-3, "mobilenetv2"), proportional(1e-3, "vit_small")
        (0.001, 0.001)
    """
    highest = {
        m: Cell((f"model/{m}",)).config["model"]["init_args"]["optimizer"]["init_args"]["lr"] for m in (model, MODEL)
    }
    return float(f"{rate * highest[model] / highest[MODEL]:.6g}")


def dense(seed: int, model: str = MODEL, settings: Mapping[str, Any] | None = None) -> Cell:
    """The dense four-task model on Rooms."""
    configs = ("trainer/default", "data/rooms", f"model/{model}", "pruning/dense", "logger/none", "recipe/dense")
    options: dict[str, Any] = {"seed_everything": seed, "data.init_args.seed": seed, **TRAINING.get(model, {})}
    if model in EPOCHS:
        options["trainer.max_epochs"] = EPOCHS[model]
    return Cell(configs, {**options, **(settings or {})})


def floor(sparsity: float) -> float:
    """The benchmark's floor, the same for every method: 5 % of every layer, but at most a fifth of what stays.

    Example:
        >>> [floor(s) for s in (0.7, 0.9, 0.95, 0.98)]
        [0.05, 0.02, 0.01, 0.004]
    """
    return round(min(FLOOR, (1 - sparsity) / 5), 6)


def following(config: Mapping[str, Any], seed: int, target: float | None, path: str = "pruning") -> dict[str, Any]:
    """Settings for the options of a method's config that follow the budget or the seed, wherever they are."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping):
            found |= following(value, seed, target, name)
        elif key in FOLLOW_SEED:
            found[name] = seed
        elif key in FOLLOW_TARGET and target is not None:
            found[name] = target
    return found


def pruned(
    method: str,
    sparsity: float | None,
    seed: int,
    tasks: Sequence[str] = KEPT,
    start: Cell | None = None,
    rate: float | None = None,
    model: str = MODEL,
    settings: Mapping[str, Any] | None = None,
    level: float | None = None,
) -> Cell:
    """One run of a method from the dense model.

    Args:
        method: A config under ``configs/pruning``.
        sparsity: The budget; None leaves the config's (a dense model has none).
        seed: Of data order, augmentation and scoring; the dense model has the same.
        tasks: The kept tasks.
        start: The dense run; default that of the seed.
        rate: Highest learning rate for MobileNetV2; default :func:`rate_of` the method. Other models have it in the
            proportion of their dense rates.
        model: A config under ``configs/model``.
        settings: Further options.
        level: The sparsity whose learning rate is taken, where ``sparsity`` does not say it.
    """
    start = start or dense(seed, model)
    configs = (
        "trainer/default",
        "data/rooms",
        f"model/{model}",
        f"pruning/{method}",
        "logger/none",
        "recipe/recover",
    )
    plain = Cell(configs)
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "pruning.tasks": list(tasks),
        RATE: proportional(rate or rate_of(method, sparsity if level is None else level), model),
        **TRAINING.get(model, {}),
        **RECOVERY.get(model, {}),
    }
    if sparsity is not None:
        options["pruning.budget.init_args.target"] = sparsity
        if floor(sparsity) != FLOOR:
            options["pruning.floor"] = floor(sparsity)
    options |= following(plain.config.get("pruning", {}), seed, sparsity)
    return Cell(configs, {**options, **(settings or {})}, start)


def longer(seeds: Sequence[int], tasks: Sequence[str] = KEPT, model: str = MODEL) -> dict[str, Cell]:
    """The dense model trained for the extra steps, by the id of the dense run it starts from."""
    found = [pruned("dense-longer", None, s, tasks, model=model) for s in seeds]
    return {c.start.id: c for c in found if c.start is not None}
