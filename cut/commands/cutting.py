"""Cutting: from a prune command's options to a mask."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cut.budget import Budget, Parameters, Smallest, Sparsity
from cut.commands import budgets
from cut.commands.resuming import contents_of
from cut.commands.source import Source, few, zeros_of
from cut.decomposition import Loss, Owners, forward, kept_parameters, network_input, owners
from cut.executorch import export_executorch
from cut.export import export_onnx
from cut.fusion import Fusion, Vote
from cut.limits import Bytes, MACs, Together, UnitBudget
from cut.masks import make_mask
from cut.objectives import moved
from cut.records import machine
from cut.scores import Scores
from cut.search import Found, Reading, Target, TooSlowError
from cut.selection import Mask
from cut.snapshot import digest
from cut.speed import ROUNDING, density_of, fast_enough, reading_of
from cut.structured import Plan, make_unit_mask, plan

RUNTIMES = {"onnx": ".onnx", "executorch": ".pte"}
# Packages that write and run a runtime's files; what else matters is in the facts on the machine.
WRITERS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch", "torchao")}
# Options that the channels of a cut of some density depend on, besides the budgets.
MATTERS = ("share", "sparsity", "floor", "reduce", "cap", "inside", "batches", "seed")


@dataclass(frozen=True)
class Job:
    """What is cut, and how.

    Attributes:
        args: The command's options, checked.
        network: The whole network, on its device.
        tasks: The tasks to keep.
        losses: Losses of all tasks of the network.
        first: A few pictures with labels, on the device.
        used: Which task uses which parameter.
        plan: The units, None when single weights are cut.
        cut: What is cut already.
        facts: Bytes of the facts that are saved with the model, which count in a budget of bytes.
        fusion: How voters agree; None = the vote share of the options.
        load: Of the machine, before the command's own work; None where nothing is timed.
    """

    args: argparse.Namespace
    network: nn.Module
    tasks: list[str]
    losses: Mapping[str, Loss]
    first: Any
    used: Owners
    plan: Plan | None
    cut: Mask | None
    facts: int = 0
    fusion: Fusion | None = None
    load: float | None = None

    def __post_init__(self) -> None:
        if self.plan is not None:
            self.plan.cost.facts = self.facts

    @property
    def parameters(self) -> int:
        """Parameters of the dense model with the kept heads."""
        kept = kept_parameters(self.network, self.used, self.tasks)
        return sum(p.numel() for n, p in self.network.named_parameters() if n in kept)

    def mask(self, scores: Mapping[str, Scores], more: list[UnitBudget] | None = None, fraction: float = 1.0) -> Mask:
        """The mask at a fraction of the way to all budgets; ``more`` of them only with units.

        Raises:
            ValueError: If a budget is out of reach.
        """
        args = self.args
        common: dict[str, Any] = {
            "fusion": self.fusion or Vote(args.share),
            "floor_share": floor_of(args),
            "cut": self.cut,
            "fraction": fraction,
        }
        if self.plan is None:
            budget = budget_of_weights(args.budget, args.sparsity, self.parameters)
            return make_mask(self.network, scores, self.first, self.losses, self.tasks, budget=budget, **common)
        return make_unit_mask(
            self.network,
            scores,
            self.first,
            self.losses,
            self.tasks,
            budget=Together([*self._limits(), *(more or [])] or [Sparsity(0.0)]),
            reduce=args.reduce,
            rounding=rounding_of(args),
            cap=args.cap,
            inside=None if args.inside is None else Sparsity(args.inside),
            units=self.plan,
            **common,
        )

    def _dense_bytes(self) -> float:
        """Bytes on disk of the dense model with the kept heads, its facts left out."""
        cost = self.units.cost
        return cost.dense["bytes"] + cost.file_overhead - cost.facts

    @property
    def units(self) -> Plan:
        """The units, which there are where channels are cut."""
        assert self.plan is not None
        return self.plan

    def fast_enough(self, scores: Mapping[str, Scores], wish: budgets.Wish, progress: bool) -> Found:
        """The largest model, cut in one round by these scores, that meets all budgets, a latency among them.

        Raises:
            ValueError: If the latency or another budget is out of reach.
        """
        args = self.args
        cache = args.out.parent / f"{args.out.name}.latency.json"
        if args.restart:  # readings too are made anew, as of a machine that was busy
            cache.unlink(missing_ok=True)
        network, example, timing = self._timed()

        def mask_of(density: float) -> Mask:
            return {n: m.cpu() for n, m in self.mask(scores, [MACs(density)]).items()}

        try:
            return fast_enough(
                network,
                mask_of,
                self.tasks,
                example,
                latency_target(wish),
                highest=density_of(self.units, self.mask(scores)),
                cache=cache,
                key=key_of_readings(args, network, self.tasks, example),
                progress=progress,
                **timing,
            )[1]
        except TooSlowError as error:
            if (multiple := rounding_of(args)) == 1:
                raise
            told = f"{error}; every layer keeps a multiple of {multiple} channels: --rounding 1 allows smaller models"
            raise TooSlowError(told) from error

    def reading(self, mask: Mask, wish: budgets.Wish) -> Reading:
        """The latency of what a mask leaves, in the unit of the latency that is asked for."""
        network, example, timing = self._timed()
        mask = {n: m.cpu() for n, m in mask.items()}
        return reading_of(network, mask, self.tasks, example, latency_target(wish), **timing)

    def _timed(self) -> tuple[nn.Module, Tensor, dict[str, Any]]:
        """A copy of the network to make files of, an example input, and how they are written and timed."""
        suffix = RUNTIMES[self.args.runtime]
        write = export_executorch if suffix == ".pte" else export_onnx
        timing = {"write": write, "suffix": suffix, "threads": self.args.threads}
        return copy.deepcopy(self.network).cpu().eval(), network_input(self.first).cpu(), timing

    def _limits(self) -> list[UnitBudget]:
        """The budgets that follow from a choice of units alone."""
        found: list[UnitBudget] = [] if self.args.sparsity is None else [Sparsity(self.args.sparsity)]
        for wish in self.args.budget:
            if wish.kind == "params":
                found.append(Parameters(max(1, int(wish.absolute(self.units.cost.dense["parameters"])))))
            elif wish.kind == "macs":
                found.append(MACs(wish.amount))
            elif wish.kind == "bytes":
                found.append(Bytes(max(2.0, wish.absolute(self._dense_bytes()))))
        return found


def latency_target(wish: budgets.Wish) -> Target:
    """What a search stays within."""
    return Target(wish.amount, "x" if wish.relative else "ms")


def budget_of_weights(wishes: Sequence[budgets.Wish], sparsity: float | None, params: int) -> Budget:
    """The budget over single weights.

    Args:
        wishes: Checked by :func:`cut.commands.budgets.check`.
        sparsity: The fraction removed, or None.
        params: Parameters of the dense model with the kept heads.
    """
    found: list[Budget] = [] if sparsity is None else [Sparsity(sparsity)]
    found += [Parameters(max(1, int(w.absolute(params)))) for w in wishes if w.kind == "params"]
    return found[0] if len(found) == 1 else Smallest(found)


def floor_of(args: argparse.Namespace) -> float:
    """The floor: what was asked for, else 5 % of every layer, but never above the cap or half of what stays."""
    if args.floor is not None:
        return float(args.floor)
    least = [1 - s for s in (args.sparsity, args.inside) if s is not None]
    return min([0.05, args.cap, *(s / 2 for s in least)])


def rounding_of(args: argparse.Namespace) -> int:
    """Of what number of channels layers keep a multiple: as asked for, else as a latency is met with most of them."""
    timed = any(w.kind == "latency" for w in args.budget)
    return int(args.rounding or (ROUNDING if timed else 1))


def prepare(args: argparse.Namespace, source: Source, network: nn.Module, tasks: list[str]) -> Job:
    """See what belongs to which task, and find the units; before any work that takes long.

    Raises:
        ValueError: If the network has no units that can be cut; it names the module that stops it.
    """
    device = next(network.parameters()).device
    data = source.labelled()
    first = moved(few(data.score(1)[0]), device)
    with torch.no_grad():
        every = forward(network, first)  # heads that are dropped too
    losses = {t: data.objectives[t].loss for t in every}
    used = owners(network, first, losses, list(losses))
    found = plan(network, first, losses, tasks) if args.units == "channels" else None
    return Job(args, network, tasks, losses, first, used, found, zeros_of(network) if source.cut else None)


def key_of_readings(
    args: argparse.Namespace, network: nn.Module, tasks: Sequence[str], example: Tensor
) -> dict[str, Any]:
    """What the latencies that a search has read depend on: what is cut and how, and what it is timed in and on."""
    cut = {k: getattr(args, k) for k in MATTERS} | {"rounding": rounding_of(args)}
    data = {"data": args.data, "contents of the data": contents_of(args.data), "pictures": digest({"": example})}
    timed = {"runtime": args.runtime, "threads": args.threads, "size": list(example.shape)}
    timed |= {"machine": {"name": platform.node(), **machine()}, "versions": _versions(WRITERS[args.runtime])}
    model = {"model": args.source, "weights": digest(network.state_dict()), "tasks": list(tasks)}
    return {**model, **cut, "budget": [str(b) for b in args.budget], **data, **timed}


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages, None for one that is not there."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
