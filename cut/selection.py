"""Selection: the best units of a ranking, exactly, without sorting it.

A 5-task model can have 200 million scores. Sorting them takes half a minute and several copies; finding the cut-off
does not need it. The bits of a float32, read as an integer, are ordered like the float. Their upper 17 bits bin the
scores of each task; the bins' cumulative counts bound every unit's percentile, hence its fused value (an order
statistic of bounds bounds the order statistic). Bisection on the cut-off then leaves a thin band of undecided units,
and only that band is ranked exactly. The result equals full sorting, ties by index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cut.fusion import Ranking
from cut.histogram import Histogram, Positions, bins_of, chunks

Mask = dict[str, Tensor]

_SAMPLE = 1 << 20
_ABOVE, _BELOW = 0.0, 2.0


def _order(ranking: Ranking) -> list[tuple[str, tuple[str, ...], int]]:
    """Parameter name, tasks that use it and votes needed, in the order that breaks ties."""
    return [(n, ts, ranking.votes_needed(len(ts))) for n, ts in ranking.tasks_of().items()]


def _voted(parts: list[Tensor], edges: list[float], votes: int) -> Tensor:
    """Where at least ``votes`` of the tasks' scores reach their edge."""
    if len(parts) == 1:
        return parts[0] >= edges[0]
    found = (parts[0] >= edges[0]).to(torch.uint8)
    for part, edge in zip(parts[1:], edges[1:], strict=True):
        found += part >= edge
    return found >= votes


@dataclass
class _Window:
    """The undecided scores of one selection: bins [low, high) of each task; above is in, below is out."""

    low: dict[str, int]
    high: dict[str, int]


class _Selector:
    """The work shared by all selections from one ranking."""

    def __init__(self, ranking: Ranking, free: Mask) -> None:
        self.ranking, self.free = ranking, free
        self.order = _order(ranking)
        alone = {t: {n: free.get(n) for n, ts, _ in self.order if ts == (t,)} for t in ranking.scores}
        self.histograms = {t: Histogram(s, alone[t]) for t, s in ranking.scores.items()}

    def count(self, cutoff: float, sure: bool, stride: int = 1) -> float:
        """Free units whose fused value surely (or else possibly) is <= cutoff; an estimate if stride > 1."""
        bins = {t: h.bound(cutoff, sure) for t, h in self.histograms.items()}
        edges = {t: h.edge(bins[t]) for t, h in self.histograms.items()}
        total = float(sum(h.private_at_least[bins[t]] for t, h in self.histograms.items()))
        for name, tasks, votes in self.order:
            if len(tasks) == 1:
                continue
            parts = [self.ranking.scores[t][name].reshape(-1)[::stride] for t in tasks]
            free = self.free.get(name)
            masks = [] if free is None else [free.reshape(-1)[::stride]]
            found = 0
            for pieces in chunks(*parts, *masks):
                voted = _voted(list(pieces[: len(parts)]), [edges[t] for t in tasks], votes)
                found += int((voted & pieces[-1] if masks else voted).sum())
            total += found * (self.ranking.scores[tasks[0]][name].numel() / max(1, len(parts[0])))
        return total

    def _bisect(self, count: int, sure: bool, stride: int) -> float:
        """The largest cut-off that possibly keeps at most (or the smallest that surely keeps) ``count``."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            found = self.count(middle, sure, stride)
            if (found >= count) if sure else (found > count):
                high = middle
            else:
                low = middle
        return high if sure else low

    def cutoffs(self, count: int) -> tuple[float, float]:
        """Cut-offs (a, b) with: possibly kept at a <= count <= surely kept at b."""
        shared = sum(self.ranking.scores[ts[0]][n].numel() for n, ts, _ in self.order if len(ts) > 1)
        stride = 1 if shared <= _SAMPLE else 61  # coprime to kernel sizes and channel counts
        low, high = self._bisect(count, False, stride), self._bisect(count, True, stride)
        step = 0.0 if stride == 1 else 2e-3 * max(high, 1e-3)
        while low > 0 and self.count(low := max(0.0, low - step), False) > count:
            step *= 4
        step = 0.0 if stride == 1 else 2e-3 * max(high, 1e-3)
        while high < 1 and self.count(high := min(1.0, high + step), True) < count:
            step *= 4
        return low, high

    def window(self, low: float, high: float) -> _Window:
        """The bins of each task that the cut-offs leave undecided."""
        bottom = {t: h.bound(high, False) for t, h in self.histograms.items()}
        top = {t: h.bound(low, True) for t, h in self.histograms.items()}
        return _Window(bottom, {t: max(top[t], bottom[t]) for t in top})

    def fused(
        self,
        name: str,
        tasks: tuple[str, ...],
        votes: int,
        index: Tensor,
        window: _Window,
        exact: dict[str, Positions],
    ) -> Tensor:
        """The fused values of some units of a parameter, exact where they fall into the window."""
        rows = []
        for task in tasks:
            values = self.ranking.scores[task][name].reshape(-1)[index]
            bins = bins_of(values)
            row = torch.full(values.shape, _BELOW, dtype=torch.float64, device=values.device)
            row[bins >= window.high[task]] = _ABOVE
            inside = (bins >= window.low[task]) & (bins < window.high[task])
            row[inside] = exact[task].percentile(values[inside])
            rows.append(row)
        return torch.stack(rows).kthvalue(votes, dim=0).values

    def positions(self, windows: list[_Window]) -> dict[str, Positions]:
        """Exact percentiles inside the windows, for every task."""
        return {
            t: Positions(s, self.histograms[t], [(w.low[t], w.high[t]) for w in windows if t in w.low])
            for t, s in self.ranking.scores.items()
        }


def best(ranking: Ranking, count: int, front: Mask | None = None, back: Mask | None = None) -> Mask:
    """The ``count`` best units of a ranking: ``True`` = among them.

    Exactly ``count`` units are chosen. Ties are broken by index, so a smaller count gives a subset.

    Args:
        ranking: The order over all units.
        count: How many units to choose.
        front: Units that come before all others (a floor).
        back: Units that are never chosen (already cut). A unit in both is never chosen.

    Returns:
        Parameter name to a bool tensor of the parameter's shape.

    Raises:
        ValueError: If ``count`` is below the number of front units or above the number of units that may be chosen.

    Example:
        >>> r = Ranking({"a": {"w": torch.tensor([3.0, 1.0, 2.0])}})
        >>> best(r, 2)["w"].tolist()
        [True, False, True]
    """
    order = _order(ranking)
    shapes = {n: ranking.scores[ts[0]][n] for n, ts, _ in order}
    # In the order of the indices, also where the scores' memory is that of channels-last weights.
    mask: Mask = {n: torch.zeros(s.shape, dtype=torch.bool, device=s.device) for n, s in shapes.items()}
    for name, chosen in (front or {}).items():
        mask[name] |= chosen
    free: Mask = {}
    for name in shapes:
        if back and name in back:
            mask[name] &= ~back[name]
        taken = mask[name] | back[name] if back and name in back else mask[name]
        if taken.any():
            free[name] = ~taken
    fixed = sum(int(m.sum()) for m in mask.values())
    available = fixed + sum(int(free[n].sum()) if n in free else s.numel() for n, s in shapes.items())
    if not fixed <= count <= available:
        raise ValueError(f"cannot keep {count} units: the floor keeps {fixed} and {available} may be kept")
    if count == fixed:
        return mask
    _fill(ranking, free, count - fixed, mask)
    return mask


def _fill(ranking: Ranking, free: Mask, count: int, mask: Mask) -> None:
    """Add the ``count`` best free units to the mask."""
    selector = _Selector(ranking, free)
    low, high = selector.cutoffs(count)
    window = selector.window(low, high)
    sure = {t: h.edge(h.bound(low, True)) for t, h in selector.histograms.items()}
    maybe = {t: h.edge(window.low[t]) for t, h in selector.histograms.items()}
    left, band = count, []
    for name, tasks, votes in selector.order:
        scores = [ranking.scores[t][name].reshape(-1) for t in tasks]
        allowed = free.get(name)
        undecided, start = [], 0
        flat = mask[name].view(-1)
        for pieces in chunks(*scores, *([] if allowed is None else [allowed])):
            parts = list(pieces[: len(scores)])
            chosen = _voted(parts, [sure[t] for t in tasks], votes)
            possible = _voted(parts, [maybe[t] for t in tasks], votes)
            if allowed is not None:
                chosen, possible = chosen & pieces[-1], possible & pieces[-1]
            left -= int(chosen.sum())
            flat[start : start + len(chosen)] |= chosen
            undecided.append((possible & ~chosen).nonzero().squeeze(1) + start)
            start += len(chosen)
        band.append(torch.cat(undecided) if undecided else torch.zeros(0, dtype=torch.long))
    if left:
        _fill_band(selector, window, band, left, mask)


def _fill_band(selector: _Selector, window: _Window, band: list[Tensor], left: int, mask: Mask) -> None:
    """Decide the band by exact fused values, ties by index."""
    exact = selector.positions([window])
    fused = [
        selector.fused(name, tasks, votes, index, window, exact)
        for (name, tasks, votes), index in zip(selector.order, band, strict=True)
    ]
    chosen = torch.zeros(sum(len(f) for f in fused), dtype=torch.bool, device=fused[0].device)
    chosen[torch.cat(fused).sort(stable=True).indices[:left]] = True
    parts = chosen.split([len(f) for f in fused])
    for (name, _, _), index, part in zip(selector.order, band, parts, strict=True):
        mask[name].view(-1)[index[part]] = True


def _smallest(values: Tensor, count: int) -> Tensor:
    """Bool of the ``count`` smallest values, ties by index."""
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = values.kthvalue(count).values
    chosen = values < limit
    tied = (values == limit).nonzero().squeeze(1)
    chosen[tied[: count - int(chosen.sum())]] = True
    return chosen


def best_per_layer(ranking: Ranking, counts: Mapping[str, int]) -> Mask:
    """The best units *within* each parameter, by the same ranking.

    Args:
        ranking: The order over all units.
        counts: Parameter name to how many of its units to choose (at most all are).

    Returns:
        Parameter name to a bool tensor, for the parameters in ``counts``.
    """
    mask: Mask = {}
    shared = []
    for name, tasks, votes in _order(ranking):
        if name not in counts:
            continue
        score = ranking.scores[tasks[0]][name]
        if len(tasks) == 1:
            mask[name] = _smallest(-score.reshape(-1).float(), counts[name]).view(score.shape)
        else:
            shared.append((name, tasks, votes))
    if shared:
        mask.update(_best_of_shared(ranking, shared, counts))
    return mask


def _best_of_shared(
    ranking: Ranking, layers: list[tuple[str, tuple[str, ...], int]], counts: Mapping[str, int]
) -> Mask:
    """:func:`best_per_layer` for parameters that several tasks use."""
    selector = _Selector(ranking, {})
    windows = []
    for name, tasks, votes in layers:
        bounds = []
        for limits in ("best", "worst"):
            rows = [
                torch.from_numpy(getattr(selector.histograms[t], limits)).to(s.device)[bins_of(s.reshape(-1))]
                for t in tasks
                for s in [ranking.scores[t][name]]
            ]
            fused = torch.stack(rows).kthvalue(votes, dim=0).values
            bounds.append(float(fused.kthvalue(min(max(1, counts[name]), len(fused))).values))
        low, high = np.nextafter(bounds[0], 0), bounds[1]
        window = selector.window(low, high)
        windows.append(_Window({t: window.low[t] for t in tasks}, {t: window.high[t] for t in tasks}))
    exact = selector.positions(windows)
    mask: Mask = {}
    for (name, tasks, votes), window in zip(layers, windows, strict=True):
        score = ranking.scores[tasks[0]][name]
        index = torch.arange(score.numel(), device=score.device)
        values = selector.fused(name, tasks, votes, index, window, exact)
        mask[name] = _smallest(values, counts[name]).view(score.shape)
    return mask
