"""Masks that move at the same sparsity: what is dropped, what grows, and how much."""

import copy
import itertools
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from cut.allocation import LayerSparsity
from cut.decomposition import prunable
from cut.fusion import Vote
from cut.masks import apply_mask
from cut.pruning import Pruning
from cut.regrowth import Regrowth
from cut.schedules import OneShot
from cut.scores import Magnitude, Sensitivity
from tests.small_networks import Cnn, random_mask, silenced, trained
from tests.test_pruning import build, fit, weights_of_kept, zeros
from tests.test_reference import LOSSES, batches

KEPT = ["seg", "depth"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(Cnn())


@pytest.fixture
def mask(model):
    """A mask over the layers that the kept tasks use, applied."""
    dropped = ("heads.normal", "scene", "classify")
    found = {n: m for n, m in random_mask(model, 0.7).items() if not n.startswith(dropped)}
    apply_mask(model, found)
    return found


def gradients(model, data, tasks) -> dict[str, np.ndarray]:
    """Sum over batches of |gradient| of the tasks' summed loss, in double precision."""
    net = copy.deepcopy(model).double().eval()
    total: dict[str, np.ndarray] = {}
    for batch in data:
        net.zero_grad(set_to_none=True)
        labels = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        outputs = net(labels["image"])
        sum(LOSSES[t](outputs[t], labels) for t in tasks).backward()
        for name, p in prunable(net).items():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.abs().numpy()
    return total


def moves(before, after, name) -> tuple[np.ndarray, np.ndarray]:
    """Indices that a layer dropped and grew."""
    a, b = before[name].flatten().numpy(), after[name].flatten().numpy()
    return np.flatnonzero(a & ~b), np.flatnonzero(~a & b)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
def test_the_smallest_go_and_the_largest_gradients_come(model, mask, share):
    data = batches(count=2)
    joint = Regrowth(Sensitivity(power=0, joint={}))
    given = {n: m.clone() for n, m in mask.items()}
    after = joint(model, mask, data, LOSSES, KEPT, share)
    assert all(torch.equal(m, given[n]) for n, m in mask.items())  # a new mask is made
    grads, weights = gradients(model, data, KEPT), prunable(model)
    for name, before in mask.items():
        assert int(after[name].sum()) == int(before.sum()), name
        count = min(int(share * int(before.sum())), int((~before).sum()))
        dropped, grown = moves(mask, after, name)
        assert len(dropped) == len(grown) == count, name
        if not count:
            continue
        size = weights[name].detach().abs().flatten().numpy()
        active, free = before.flatten().numpy(), ~before.flatten().numpy()
        assert size[dropped].max() <= np.delete(size, dropped)[np.delete(active, dropped)].min(initial=math.inf)
        # Scores are float32: neighbours at the cut-off may change places.
        slope = grads[name].ravel()
        best = np.sort(slope[free])[::-1][:count]
        np.testing.assert_allclose(np.sort(slope[grown])[::-1], best, rtol=1e-3, err_msg=name)
        assert not size[grown].any()  # they start at zero


def percentiles(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Share of all units of the task whose score is at least as large."""
    everything = np.concatenate([s.ravel() for s in scores.values()])
    return {n: (everything[None] >= s.reshape(-1, 1)).mean(1) for n, s in scores.items()}


def test_the_union_grows_what_either_task_wants_most(model, mask):
    """Vote(0): by the better of the two tasks' positions, each among the weights that were not kept."""
    data = batches(count=1)
    scores = {t: {n: s for n, s in per.items()} for t, per in Sensitivity(power=0)(model, data, LOSSES, KEPT).items()}
    after = Regrowth(fusion=Vote(0.0))(model, mask, data, LOSSES, KEPT, 0.3)
    free = {t: {n: np.where(mask[n].numpy(), -1.0, s.numpy()) for n, s in per.items()} for t, per in scores.items()}
    rank = {t: percentiles(per) for t, per in free.items()}
    both = 0
    for name in mask:
        mine = [rank[t][name] for t in KEPT if name in rank[t]]
        fused = np.min(mine, 0)
        _, grown = moves(mask, after, name)
        assert (np.sort(fused[grown]) == np.sort(fused)[: len(grown)]).all(), name
        if len(mine) == 2 and len(grown) > 3:
            wanted = [set(np.argsort(m)[: len(grown)].tolist()) for m in mine]
            assert set(grown.tolist()) <= wanted[0] | wanted[1], name
            both += bool(set(grown.tolist()) - wanted[0]) and bool(set(grown.tolist()) - wanted[1])
    assert both  # in some layer each task had its say
    default = Regrowth()(model, mask, data, LOSSES, KEPT, 0.3)
    assert all(torch.equal(m, default[n]) for n, m in after.items())


def test_layers_that_cannot_move_stay(model, mask):
    data = batches(count=1)
    mask["stem.weight"][:] = True  # nothing to grow
    mask["block1.expand.weight"][:] = False  # nothing to drop
    mask["low.0.weight"][:] = False
    mask["low.0.weight"].view(-1)[0] = True  # a share of one weight is none
    after = Regrowth()(model, mask, data, LOSSES, KEPT, 0.5)
    for name in ("stem.weight", "block1.expand.weight", "low.0.weight"):
        assert torch.equal(after[name], mask[name]), name
    still = Regrowth()(model, mask, data, LOSSES, KEPT, 0.0)
    assert all(torch.equal(m, mask[n]) for n, m in still.items())


def test_nearly_nothing_free_grows_all_of_it(model, mask):
    mask["block2.project.weight"][:] = True
    mask["block2.project.weight"].view(-1)[[3, 40, 700]] = False
    apply_mask(model, mask)
    after = Regrowth()(model, mask, batches(count=1), LOSSES, KEPT, 0.5)
    dropped, grown = moves(mask, after, "block2.project.weight")
    assert grown.tolist() == [3, 40, 700] and len(dropped) == 3


def test_silenced_biases_and_norms_wake_up(model, mask):
    extended = silenced(model, mask, batches(count=1)[0]["image"])
    assert set(extended) > set(mask)
    after = Regrowth()(model, extended, batches(count=1), LOSSES, KEPT, 0.3)
    assert after.keys() == extended.keys()
    assert all(after[n].all() for n in set(extended) - set(mask))


def test_the_share_falls_along_a_cosine():
    regrowth = Regrowth(rate=0.4, every=2, start=1, end=9)
    for epoch in range(12):
        moves_now = epoch in (1, 3, 5, 7)
        expected = 0.2 * (1 + math.cos(math.pi * epoch / 8)) if moves_now else 0.0
        assert regrowth.share(epoch) == pytest.approx(expected, abs=1e-9), epoch
    shares = [Regrowth(rate=0.5, start=0, end=6).share(e) for e in range(6)]
    assert all(0.5 > a > b >= 0 for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate 0.0"),
        ({"rate": 1.5}, "rate 1.5"),
        ({"every": 0}, "every=0"),
        ({"start": 3, "end": 3}, "start=3, end=3"),
        ({"start": -1}, "start=-1"),
        ({"batches": 0}, "batches=0"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Regrowth(**options)


class Watch(pl.Callback):
    """Mask and weights at the start of every epoch; goes behind Pruning."""

    def __init__(self) -> None:
        self.masks, self.weights, self.ends = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        pruning = next(c for c in trainer.callbacks if isinstance(c, Pruning))
        self.masks.append({n: m.clone() for n, m in pruning.mask.items()})
        self.weights.append({n: p.detach().clone() for n, p in pl_module.network.named_parameters()})

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append({n: p.detach().clone() for n, p in pl_module.network.named_parameters()})


@pytest.mark.parametrize("silence", [False, True])
def test_the_sparsity_is_constant_while_the_mask_moves(tmp_path, silence):
    model, data = build()
    watch = Watch()
    pruning = Pruning(
        LayerSparsity(0.8, "erk"),
        tasks=KEPT,
        scorer=Magnitude(),
        schedule=OneShot(1),
        batches=1,
        silence=silence,
        regrowth=Regrowth(rate=0.5, start=1, end=5),
    )
    fit(model, data, [pruning, watch], tmp_path, 6)
    kept = weights_of_kept(model, KEPT)
    budget = round(0.8 * sum(w.numel() for w in kept.values()))
    assert not watch.masks[0] and [zeros(m, kept) for m in watch.masks[1:]] == [budget] * 5
    moved = 0
    for epoch in range(2, 6):
        old, new = watch.masks[epoch - 1], watch.masks[epoch]
        for name in kept:
            assert int(old[name].sum()) == int(new[name].sum()), name
            dropped, grown = moves(old, new, name)
            moved += len(grown)
            start = watch.weights[epoch][name].flatten().numpy()
            assert not start[grown].any() and not start[dropped].any()
            assert not watch.ends[epoch][name][~new[name]].any()
        changed = any((old[n] != new[n]).any() for n in kept)
        assert changed == (pruning.regrowth.share(epoch) > 0) == (epoch < 4)
    assert moved > 1000
    last, end = watch.masks[3], watch.ends[3]
    grown = [(n, moves(watch.masks[2], last, n)[1]) for n in kept]
    assert sum(int((end[n].flatten()[g] != 0).sum()) for n, g in grown) > 0  # what grew has been trained
