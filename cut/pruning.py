"""Pruning: the Lightning callback that scores, fuses, cuts and keeps cut at the epochs of a schedule."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cut.allocation import LayerSparsity
from cut.budget import Budget, Sparsity
from cut.decomposition import check_tasks, kept_parameters, owners
from cut.fusion import FallingVote, Fusion, Vote
from cut.limits import OnlyUnits, UnitBudget
from cut.masks import apply_mask, make_mask, overlap, sparsity, task_masks
from cut.recalibration import recalibrate
from cut.reconstruction import check_fittable, reconstruct, unfittable
from cut.regrowth import Regrowth
from cut.rewinding import Rewind
from cut.schedules import OneShot, Schedule, rounds_of
from cut.scorebatches import ScoringBatches
from cut.scores import Scorer, Scores, Sensitivity
from cut.selection import Mask
from cut.structured import Channels, Plan, check_reach, chosen_units, make_unit_mask, plan


class Pruning(Callback):
    """Cut a multi-task model for chosen tasks at set epochs of ``trainer.fit``.

    Before the training of an epoch in the schedule: score on a fixed list of batches, fuse, meet the budget, set
    weights to zero. After every optimiser step the mask is applied again, so neither momentum nor weight decay revives
    a weight. The mask lives in this callback's checkpoint state; the model's own keys never change. Masks only shrink.

    Works with a LightningModule that has ``network`` (forward returns ``{task: Tensor}``), ``losses`` (task to loss
    function) and ``select(tasks)``, and a data module that has ``score_batches(n)``, as
    :class:`cut.model.MultiTaskModel` and :class:`cut.data.base.MultiTaskData` do.

    Args:
        budget: How much is cut; None prunes nothing (a dense run), but still selects the tasks.
        tasks: The tasks to keep; None keeps all.
        scorer: What a weight is worth; default CUT's score.
        fusion: How tasks agree on what they share; default vote share 0.5.
        schedule: When is how much cut; default everything before the first epoch.
        floor: Share of every layer that is kept before any cut; 0 for none.
        batches: Number of scoring batches.
        silence: Whether dead channels are silenced; off in reference mode.
        rewind: Where the weights go back to after every cut; None leaves them. The optimiser then starts anew.
        regrowth: How the mask moves between cuts at the same sparsity; None leaves it.
        reconstruct: Number of scoring batches on which the weights that stay are fitted to give every layer's output of
            before the cut (:mod:`cut.reconstruction`).
        rounds: In how many rounds a cut is made, each removing the same share of what is left, scored and fitted again
            before the next, without training between them.
        fit_to: With several rounds: whether the weights are fitted to the outputs of before each ``"round"``, or of
            before the first one, which is the ``"dense"`` network's where nothing was cut before.
        voters: Tasks that are scored and have a vote; None = the kept ones. With more of them, dropped tasks too say
            what the shared part keeps.
        recalibrate: Number of scoring batches on which batch norm's statistics are measured anew after a cut.
        units: What is cut: ``"weights"`` one by one, or ``"channels"``: whole channels, attention heads and neurons
            (:class:`cut.structured.Channels`, which has further options).
        rounding: With channels: every layer keeps a multiple of so many.
        cap: With channels: the largest share of every layer's units that may stay.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        tasks: list[str] | None = None,
        scorer: Scorer | None = None,
        fusion: Fusion | None = None,
        schedule: Schedule | None = None,
        floor: float = 0.05,
        batches: int = 50,
        silence: bool = True,
        rewind: Rewind | None = None,
        regrowth: Regrowth | None = None,
        recalibrate: int = 0,
        voters: list[str] | None = None,
        reconstruct: int = 0,
        rounds: int = 1,
        fit_to: Literal["round", "dense"] = "round",
        units: Channels | Literal["weights", "channels"] = "weights",
        rounding: int = 1,
        cap: float = 1.0,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor {floor}; allowed: 0 to 1 (a share of every layer)")
        if batches < 1:
            raise ValueError(f"batches {batches}; allowed: at least 1 scoring batch")
        for name, count in (("recalibrate", recalibrate), ("reconstruct", reconstruct)):
            if count < 0:
                raise ValueError(f"{name} {count}; allowed: 0 (not at all) or a number of batches")
        if rounds < 1:
            raise ValueError(f"rounds {rounds}; allowed: at least 1")
        if fit_to not in ("round", "dense"):
            raise ValueError(f"fit_to {fit_to!r}; allowed: 'round', 'dense'")
        if regrowth is not None and units != "weights":
            raise ValueError("regrowth moves single weights; allowed with units='weights' only")
        self.units, self.rounding, self.cap = chosen_units(units, budget, rounding, cap, floor), rounding, cap
        self._plan: Plan | None = None
        self.budget, self.tasks, self.rounds = budget, tasks, rounds
        self.rewind, self.regrowth, self.recalibrate = rewind, regrowth, recalibrate
        self.voters, self.reconstruct, self.fit_to = voters, reconstruct, fit_to
        self.scorer, self.fusion = scorer or Sensitivity(), fusion or Vote(0.5)
        self.schedule = schedule or OneShot()
        self.floor, self.batches, self.silence = floor, batches, silence
        self.mask: Mask = {}
        self.scores: dict[str, Scores] = {}
        self.overlap: dict[str, dict[str, float]] = {}
        self.score_seconds = 0.0
        self.hook_seconds = 0.0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Mask, overlap of the tasks' masks, scoring time; plain tensors and numbers, so that it loads weights-only."""
        mask = {n: m.cpu() for n, m in self.mask.items()}
        state = {"mask": mask, "overlap": self.overlap, "score_seconds": self.score_seconds}
        # A scorer that is not the same at every cut (cut.start) goes on where it was.
        scorer: Any = self.scorer
        return {**state, "scorer": scorer.state_dict()} if hasattr(scorer, "state_dict") else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the mask back from a checkpoint."""
        self.mask, self.overlap = dict(state_dict["mask"]), dict(state_dict["overlap"])
        self.score_seconds = float(state_dict["score_seconds"])
        scorer: Any = self.scorer
        if "scorer" in state_dict and hasattr(scorer, "load_state_dict"):
            scorer.load_state_dict(state_dict["scorer"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module, the selection and the schedule, and select the tasks, before any work starts.

        What depends on which task uses what is checked when there are pictures: :meth:`on_fit_start`.

        Raises:
            ValueError: If the module or the data cannot be pruned, or the selection or the schedule is wrong.
        """
        for needed in ("network", "losses", "select"):
            if not hasattr(pl_module, needed):
                raise ValueError(
                    f"{type(pl_module).__name__} cannot be pruned: it has no {needed!r} (see cut.model.MultiTaskModel)"
                )
        module: Any = pl_module
        tasks = check_tasks(self.tasks if self.tasks is not None else list(module.losses), list(module.losses))
        if stage == "fit" and self.budget is not None:
            last = trainer.max_epochs
            late = [e for e in self.schedule.steps() if last is not None and last != -1 and e >= last]
            if late:
                raise ValueError(f"pruning at epoch {late[0]}, but training ends after {trainer.max_epochs} epochs")
            budget = self.budget if self.units is None else None
            if isinstance(budget, (Sparsity, LayerSparsity)) and self.floor > 1 - budget.target + 1e-9:
                raise ValueError(
                    f"sparsity {budget.target} is out of reach: the floor needs {self.floor:g} of every layer; "
                    f"allowed: a floor up to {1 - budget.target:.4g}"
                )
            if not hasattr(getattr(trainer, "datamodule", None), "score_batches"):
                raise ValueError("the data module has no score_batches(n) (see cut.data.base.MultiTaskData)")
        if self.voters is not None:
            check_tasks(self.voters, list(module.losses))
        module.select(tasks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what belongs to the kept tasks, where that decides whether they can be cut: before any training.

        Raises:
            ValueError: With units: if there are none. With reconstruction: if a layer cannot be fitted.
        """
        module: Any = pl_module
        # A layer that cannot be fitted may belong to a head that is dropped: then it need not be.
        doubtful = self.reconstruct > 0 and unfittable(module.network) is not None
        if self.budget is None or (self.units is None and not doubtful):
            return
        tasks = check_tasks(self.tasks if self.tasks is not None else list(module.losses), list(module.losses))
        module.network.select(list(module.losses))
        try:
            first = self._batches(trainer, pl_module, 1, "what is cut").first()
            if doubtful:
                used = owners(module.network, first, module.losses, list(module.losses))
                check_fittable(module.network, kept_parameters(module.network, used, tasks))
            if self.units is not None:
                self._plan = plan(module.network, first, module.losses, tasks)
                if isinstance(self.budget, UnitBudget):
                    check_reach(self._plan, self.budget, self.floor, self.rounding)
        finally:
            module.network.select(tasks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply a mask that came from a checkpoint."""
        self._apply(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if the schedule says so."""
        fraction = self.schedule.steps().get(trainer.current_epoch) if self.budget is not None else None
        if fraction is not None:
            self.prune(trainer, pl_module, fraction)
        elif self.regrowth is not None and self.mask:
            share = self.regrowth.share(trainer.current_epoch)
            if share > 0:
                self._regrow(trainer, pl_module, share)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep cut weights at zero after the optimiser's step."""
        if self._pairs:
            start = time.perf_counter()
            with torch.no_grad():
                torch._foreach_mul_([w for w, _ in self._pairs], [m for _, m in self._pairs])
            self.hook_seconds += time.perf_counter() - start

    def prune(self, trainer: Trainer, pl_module: LightningModule, fraction: float = 1.0) -> None:
        """Score, fuse, cut: one step of the schedule. In a process group all ranks end with the same mask."""
        module: Any = pl_module
        first = copy.deepcopy(module.network) if self.reconstruct and self.fit_to == "dense" else None
        for part in self._parts(pl_module, fraction):
            self._cut(trainer, pl_module, part, first)

    def _parts(self, pl_module: LightningModule, fraction: float) -> list[float]:
        """The fractions of a cut's rounds, from what is cut already; units go in equal parts of the budget."""
        if self.rounds == 1:
            return [fraction]
        module: Any = pl_module
        target = getattr(self.budget, "target", None) if self.units is None else None
        return rounds_of(self.rounds, fraction, target, sparsity(module.network, self.mask, self.mask))

    def _cut(
        self, trainer: Trainer, pl_module: LightningModule, fraction: float, first: nn.Module | None = None
    ) -> None:
        """One round: score, fuse, meet the budget, set weights to zero; ``first``: what they are fitted to."""
        if self.budget is None:
            return
        module: Any = pl_module
        network, losses = module.network, module.losses
        tasks = check_tasks(self.tasks if self.tasks is not None else list(losses), list(losses))
        start = time.perf_counter()
        batches = self._batches(trainer, pl_module, self.batches, type(self.scorer).__name__)
        voters = check_tasks(self.voters if self.voters is not None else tasks, list(losses))
        network.select(voters)
        self.scores = self.scorer(network, batches, losses, voters)
        self.score_seconds += time.perf_counter() - start
        fusion = self.fusion
        if isinstance(fusion, FallingVote):
            target = None if isinstance(self.budget, OnlyUnits) else getattr(self.budget, "target", None)
            fusion = fusion.at(None if target is None else fraction * target)
        network.select(list(losses))  # which head belongs to which task is seen with all of them running
        try:
            if set(voters) - set(tasks):
                kept = kept_parameters(network, owners(network, batches.first(), losses, list(losses)), tasks)
                self.scores = {t: {n: s for n, s in per.items() if n in kept} for t, per in self.scores.items()}
            self.mask = self._maker()(
                network,
                self.scores,
                batches.first(),
                losses,
                tasks,
                fusion=fusion,
                budget=self.budget,
                floor_share=self.floor,
                silent=self.silence,
                cut=self.mask or None,
                fraction=fraction,
            )
        finally:
            network.select(tasks)
        self._settle(trainer, pl_module, first)
        achieved = sparsity(network, self.mask, self.mask)
        if len(self.scores) > 1 and set(self.scores) <= set(losses):  # neighbours of a new task are no tasks of it
            self.overlap = overlap(task_masks(self.scores, 1 - achieved))
        trainer.callback_metrics["sparsity"] = torch.tensor(achieved)
        for logger in trainer.loggers:
            logger.log_metrics({"sparsity": achieved}, step=trainer.global_step)

    def _maker(self) -> Callable[..., Mask]:
        """What turns scores into a mask: of single weights, or of whole units."""
        if self.units is None:
            return make_mask
        units = self.units
        options: dict[str, Any] = {
            "reduce": units.reduce,
            "inside": units.inside,
            "rounding": self.rounding,
            "cap": self.cap,
        }
        return partial(make_unit_mask, units=self._plan, **options)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, first: nn.Module | None) -> None:
        """After a cut: rewind, apply the mask, measure batch norm's statistics, each if asked for."""
        module: Any = pl_module
        if self.rewind is not None:
            self.rewind(module.network)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        before = first or (copy.deepcopy(module.network) if self.reconstruct else None)
        self._apply(pl_module)
        if before is not None:
            start = time.perf_counter()
            batches = self._batches(trainer, pl_module, self.reconstruct, "fitting")
            reconstruct(module.network, before, self.mask, batches)
            self.score_seconds += time.perf_counter() - start
        if self.recalibrate:
            recalibrate(module.network, self._batches(trainer, pl_module, self.recalibrate, "batch norm"))

    def _regrow(self, trainer: Trainer, pl_module: LightningModule, share: float) -> None:
        """Move a share of the mask; what grows starts at zero."""
        assert self.regrowth is not None
        module: Any = pl_module
        start = time.perf_counter()
        batches = self._batches(trainer, pl_module, self.regrowth.batches, type(self.regrowth).__name__)
        tasks = check_tasks(self.tasks if self.tasks is not None else list(module.losses), list(module.losses))
        self.mask = self.regrowth(module.network, self.mask, batches, module.losses, tasks, share)
        self.score_seconds += time.perf_counter() - start
        self._apply(pl_module)

    def _batches(self, trainer: Trainer, pl_module: LightningModule, count: int, what: str) -> ScoringBatches:
        """Scoring batches of the trainer's data module."""
        return ScoringBatches(cast(Any, trainer).datamodule.score_batches(count), pl_module.device, what)

    def _apply(self, pl_module: LightningModule) -> None:
        """Zero what is cut; remember weights with their masks as numbers, for a fast product."""
        self.mask = {n: m.to(pl_module.device) for n, m in self.mask.items()}
        module: Any = pl_module
        apply_mask(module.network, self.mask)
        parameters = dict(module.network.named_parameters())
        self._pairs = [(parameters[n], m.to(parameters[n].dtype)) for n, m in self.mask.items() if not m.all()]
