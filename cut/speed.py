"""Speed: a model cut by whole units until its shipped file is fast enough on this machine."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cut.compact import compact, keep_tasks
from cut.conversion import Exported
from cut.decomposition import Inputs, Loss, check_tasks, network_input
from cut.export import export_onnx
from cut.fusion import Vote
from cut.limits import MACs, Together, UnitBudget
from cut.masks import apply_mask
from cut.records import machine
from cut.scores import Scorer, Sensitivity
from cut.search import Found, Reading, Target, clock, search, timed
from cut.selection import Mask
from cut.snapshot import digest
from cut.structured import Plan, make_unit_mask, plan
from cut.unitcost import Amounts
from cut.units import cut_units

Writer = Callable[..., Exported]  # as export_onnx
LOWEST, STEP = 0.02, 1.2  # of densities that are tried
ROUNDING = 8  # of channels: runtimes take longer for odd numbers of them than for the next multiple
PICTURES = 2  # that each model made is checked on; a whole batch takes a large network longer than its timing


def target_of(text: str) -> Target:
    """A latency as people write it.

    Raises:
        ValueError: If it is none.

    Example:
        >>> target_of("0.5x"), target_of("20ms")
        (Target(value=0.5, unit='x'), Target(value=20.0, unit='ms'))
    """
    match = re.fullmatch(r"(\d*\.?\d+|\d+\.)(x|ms)", text)
    if match is None:
        raise ValueError(f"latency {text!r}; allowed: such as '0.5x' (of the dense model's) or '20ms'")
    return Target(float(match[1]), "x" if match[2] == "x" else "ms")


def fast_enough(
    model: nn.Module,
    mask_of: Callable[[float], Mask],
    tasks: Sequence[str],
    example: Tensor,
    target: Target,
    *,
    write: Writer = export_onnx,
    suffix: str = ".onnx",
    highest: float = 1.0,
    tolerance: float = 0.02,
    cache: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: bool = True,
    **timing: Any,
) -> tuple[Mask, Found]:
    """The mask of the largest model whose file is fast enough: made compact, exported and timed for each try.

    Args:
        model: The model with all its heads, on the CPU; left as it is. Latency does not depend on its weights.
        mask_of: A density, which is the share of the dense model's multiply-accumulates that may be left, to a mask of
            whole units; a ValueError if that is out of reach.
        tasks: The tasks to keep.
        example: A real input, such as pictures [N, 3, H, W]; models are timed for one of its size.
        target: The latency to stay within; a share is one of the dense model's with the same kept heads.
        write: Exports a network, as :func:`cut.export.export_onnx` does.
        suffix: Of the files, which says in which runtime they are timed.
        highest: The density that other budgets allow.
        tolerance: A model at most so much faster than the target ends the search, relative; smaller takes more models.
        cache: See :func:`cut.search.search`.
        key: What the masks depend on besides the model's weights, the tasks and the example, which always count.
        progress: Show a bar.
        timing: As of :func:`cut.latency.compare`: ``threads``, ``repeats``, ``rounds`` and so on.

    Raises:
        ValueError: If the target cannot be met, or the model cannot be exported or timed.
    """
    example = example[:PICTURES]
    about: dict[str, Any] = {"weights": digest(model.state_dict()), "tasks": list(tasks)}
    about |= {"example": digest({"": example}), "suffix": suffix, "timing": repr(sorted(timing.items()))}
    about |= {"machine": machine()}

    with tempfile.TemporaryDirectory() as folder:

        def export(network: nn.Module, name: str) -> Path:
            return write(network, Path(folder) / f"{name}{suffix}", example[:1], tasks=tasks).path

        def build(density: float) -> Path:
            return export(compact(model, tasks, mask_of(density), example), f"{density}")

        dense = export(keep_tasks(model, tasks, example), "dense")
        lowest = _reachable(mask_of, highest)
        found = search(
            clock(build, dense, target, **timing),
            target,
            highest=highest,
            lowest=lowest,
            tolerance=tolerance,
            cache=cache,
            key={**about, **(key or {})},
            progress=progress,
        )
    return mask_of(found.density), found


def reading_of(
    model: nn.Module,
    mask: Mask,
    tasks: Sequence[str],
    example: Tensor,
    target: Target,
    *,
    write: Writer = export_onnx,
    suffix: str = ".onnx",
    **timing: Any,
) -> Reading:
    """The latency of what one mask leaves, in the target's unit; arguments as of :func:`fast_enough`.

    Raises:
        ValueError: If the model cannot be exported or timed.
    """
    example = example[:PICTURES]
    models = {"dense": keep_tasks(model, tasks, example), "compact": compact(model, tasks, mask, example)}
    with tempfile.TemporaryDirectory() as folder:
        dense, small = (
            write(m, Path(folder) / f"{name}{suffix}", example[:1], tasks=tasks).path for name, m in models.items()
        )
        return timed(small, dense, target, **timing)


def _reachable(mask_of: Callable[[float], Mask], highest: float) -> float:
    """About the smallest density that floors and what is never cut allow; the highest, if no smaller one."""
    density = min(LOWEST, highest)
    while True:
        try:
            mask_of(density)
            return density
        except ValueError:
            if density >= highest:
                raise
            density = min(round(density * STEP, 6), highest)


def left_by(units: Plan, mask: Mask) -> Amounts:
    """What a mask of whole units leaves, see :meth:`cut.unitcost.UnitCost.amounts`."""
    gone = cut_units(units.groups, {n: m.cpu() for n, m in mask.items()})
    return units.cost.amounts({n: ~g for n, g in gone.items()})


def density_of(units: Plan, mask: Mask) -> float:
    """The share of the dense model's multiply-accumulates that a mask of whole units leaves."""
    return min(1.0, left_by(units, mask)["macs"] / units.cost.dense["macs"])


def prune_to_latency(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    latency: str,
    *,
    share: float = 0.5,
    scorer: Scorer | None = None,
    budgets: Sequence[UnitBudget] = (),
    floor_share: float = 0.05,
    rounding: int = ROUNDING,
    inputs: Inputs | None = None,
    **options: Any,
) -> tuple[Mask, Found]:
    """CUT to a latency in one call: score each task, let them vote on channels, cut until the file is fast enough.

    Apply the mask again with :func:`cut.masks.apply_mask` after every optimiser step of the fine-tuning, then make the
    model small with :func:`cut.compact.compact`. The machine should be idle: :func:`cut.latency.warning_of` tells.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``, on the CPU; its cut weights are set to zero.
        batches: Scoring batches (some tens are plenty).
        losses: Every task of the model to a function of (output, batch).
        tasks: The tasks to keep.
        latency: ``"0.5x"`` of the dense model's with the same kept heads, or ``"20ms"``.
        share: Vote share, see :mod:`cut.fusion`.
        scorer: Default: CUT's score, :class:`cut.scores.Sensitivity`.
        budgets: Others to be met too, such as :class:`cut.budget.Parameters`.
        floor_share: Share of every layer's channels that stays.
        rounding: Every layer keeps a multiple of so many channels, where it has that many; 1 where layers are narrow.
        inputs: How to get the network's input from a batch.
        options: As of :func:`fast_enough`: ``tolerance``, ``cache``, ``progress``, ``threads`` and so on.

    Returns:
        The mask, and what was reached: density, latency and its spread.

    Raises:
        ValueError: For a bad selection or latency, a model without units, or a target that cannot be met.
    """
    target, tasks, batches = target_of(latency), check_tasks(tasks, losses), list(batches)
    known = plan(model, batches[0], losses, tasks, inputs)
    scores = (scorer or Sensitivity())(model, batches, losses, tasks, inputs)
    whole = copy.deepcopy(model).eval()

    def mask_of(density: float) -> Mask:
        return make_unit_mask(
            whole,
            scores,
            batches[0],
            losses,
            tasks,
            fusion=Vote(share),
            budget=Together([MACs(density), *budgets]),
            floor_share=floor_share,
            rounding=rounding,
            inputs=inputs,
            units=known,
        )

    example = (inputs or network_input)(batches[0]).detach()
    highest = density_of(known, mask_of(1.0)) if budgets else 1.0
    told: dict[str, Any] = {"share": share, "floor": floor_share, "rounding": rounding}
    told |= {"scores": {t: digest(per) for t, per in scores.items()}, "budgets": [repr(vars(b)) for b in budgets]}
    options["key"] = {**told, **(options.get("key") or {})}
    mask, found = fast_enough(whole, mask_of, tasks, example, target, highest=highest, **options)
    apply_mask(model, mask)
    return mask, found
