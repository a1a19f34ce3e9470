"""Torch-Pruning's importances as scores: its own values, its own order, its own pruner's channels."""

import copy

import pytest
import torch
import torch_pruning
from torch import nn
from torch_pruning.pruner.importance import GroupHessianImportance, GroupMagnitudeImportance, GroupTaylorImportance

from cut.dependency import dependency_graph
from cut.fusion import Vote
from cut.limits import MACs
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import JOINT
from cut.selection import best
from cut.structured import make_unit_mask, plan
from cut.units import cut_units, unit_scores
from experiments.importance import GroupImportance, accumulate_gradients
from tests.small_networks import Cnn, trained

SLOW = ["mobilenetv2_100", "resnet18", "vit_small_patch14_dinov2"]
BACKBONES = ["test_efficientnet", "test_resnet", "test_vit", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
JOINT_WEIGHTS = {"seg": 1.0, "depth": 3.0}
CLASSES = {"norm": GroupMagnitudeImportance, "taylor": GroupTaylorImportance}


def scorer(kind, **joint):
    return GroupImportance(CLASSES[kind], (joint or JOINT_WEIGHTS) if kind == "taylor" else None)


def losses_of(network, image):
    """A loss of each task that no output is the best of."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        goals = {t: torch.randn(o.shape, generator=generator) for t, o in network(image).items()}
    return {t: lambda out, batch, goal=goal: (out[: len(goal)] - goal).square().mean() for t, goal in goals.items()}


def setting(backbone):
    torch.manual_seed(0)
    side = 28 if "patch14" in backbone else 32
    config = NetworkConfig(backbone, head_width=8, img_size=(side, side) if "vit" in backbone else None)
    network = trained(MultiTaskNet({"seg": 4, "depth": 1, "normal": 3}, (), config))
    batches = [{"image": torch.randn(2, 3, side, side)} for _ in range(2)]
    return network, batches, losses_of(network, batches[0]["image"])


def small():
    network = trained(Cnn())
    batches = [{"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(s))} for s in (3, 4)]
    return network, batches, losses_of(network, batches[0]["image"])


def with_gradients(network, batches, losses, weights):
    """A copy with plain gradients of the weighted sum of losses, summed over batches."""
    network = copy.deepcopy(network).eval()
    network.select(list(weights)) if isinstance(network, MultiTaskNet) else None
    for batch in batches:
        outputs = network(batch["image"])
        sum(w * losses[t](outputs[t], batch) for t, w in weights.items()).backward()
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return network


def direct(network, group, kind, graph):
    """Every unit's value by a direct call, or for heads by the formula: mean over qkv and proj, then over a head."""
    layer = network.get_submodule(group.name)
    if not hasattr(layer, "qkv"):
        convolution = isinstance(layer, nn.Conv2d)
        prune = torch_pruning.prune_conv_out_channels if convolution else torch_pruning.prune_linear_out_channels
        return CLASSES[kind]()(graph.get_pruning_group(layer, prune, idxs=list(range(len(layer.weight)))))
    worth = [w * w.grad if kind == "taylor" else w for w in (layer.qkv.weight, layer.proj.weight)]
    rows, columns = (w.detach().abs() if kind == "taylor" else w.detach().square() for w in worth)
    width = len(columns)
    value = [(sum(rows[part * width + i].sum() for part in range(3)) + columns[:, i].sum()) / 2 for i in range(width)]
    return (torch.stack(value) / torch.stack(value).mean()).view(layer.num_heads, -1).mean(1)


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("backbone", BACKBONES)
def test_units_have_the_values_of_a_direct_call(backbone, kind):
    network, batches, losses = setting(backbone)
    network.select(["seg", "depth"])  # as the pruning callback leaves it
    scores = scorer(kind)(network, batches, losses, ["seg", "depth"])
    network.select(list(losses))
    groups = plan(network, batches[0], losses, ["seg", "depth"]).groups
    found = unit_scores(scores, groups, "sum")[JOINT]
    assert set(found) == {g.name for g in groups}
    reference = with_gradients(network, batches, losses, JOINT_WEIGHTS)
    del reference.heads["normal"]
    # Not Torch-Pruning's class itself: behind a position embedding it takes a head's concatenation for one of tokens.
    graph = dependency_graph(reference, batches[0]["image"])
    for group in groups:
        torch.testing.assert_close(found[group.name], direct(reference, group, kind, graph), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", list(CLASSES))
def test_the_mask_cuts_in_the_order_of_the_values(kind):
    network, batches, losses = small()
    scores = scorer(kind)(network, batches, losses, list(losses))
    known = plan(network, batches[0], losses, list(losses))
    values = unit_scores(scores, known.groups)[JOINT]
    limits = {"budget": MACs(0.6), "floor_share": 0.0, "units": known}
    mask = make_unit_mask(network, scores, batches[0], losses, list(losses), fusion=Vote(0.5), **limits)
    cut = cut_units(known.groups, mask)
    lost = torch.cat([values[n][c] for n, c in cut.items()])
    first = {n: v == v.max() for n, v in values.items()}  # every group keeps its best
    left = torch.cat([values[n][~c & ~first[n]] for n, c in cut.items()])
    assert len(lost) > 20 and lost.max() <= left.min()


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_as_many_channels_are_those_that_torch_prunings_own_pruner_cuts(kind, ratio):
    network, batches, losses = small()
    weights = dict.fromkeys(losses, 1.0)
    scores = scorer(kind, **weights)(network, batches, losses, list(losses))
    groups = plan(network, batches[0], losses, list(losses)).groups
    theirs = with_gradients(network, batches, losses, weights)
    pruner = torch_pruning.pruner.BasePruner(
        theirs,
        batches[0]["image"],
        CLASSES[kind](),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[h.out for h in theirs.heads.values()] + [theirs.classify],
        forward_fn=lambda m, x: [o * 1.0 for o in m(x).values()],
    )
    names = {id(m): n for n, m in theirs.named_modules()}
    gone = {g.name: set() for g in groups}
    for cut in pruner.step(interactive=True):
        for item in cut:
            name = names.get(id(item.dep.target.module))
            if name in gone and pruner.DG.is_out_channel_pruning_fn(item.dep.handler):
                gone[name] |= set(item.idxs)
    count = sum(map(len, gone.values()))
    values = unit_scores(scores, groups)
    kept = best(Vote(0.5)(values), sum(g.units for g in groups) - count)
    assert count == pytest.approx(ratio * 192, abs=1)
    assert {n: set((~k).nonzero().flatten().tolist()) for n, k in kept.items()} == gone


def test_gradients_are_those_of_the_weighted_sum_over_batches():
    network, batches, losses = small()
    weights = {"seg": 0.5, "scene": 4.0}
    want = {n: torch.zeros_like(p) for n, p in network.named_parameters()}
    for task, weight in weights.items():
        alone = with_gradients(network, batches, losses, {task: 1.0})
        for name, parameter in alone.named_parameters():
            want[name] += weight * parameter.grad
    network.train()
    accumulate_gradients(network, batches, losses, weights)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert network.training


def test_a_loss_weight_changes_the_order_and_a_common_factor_does_not():
    network, batches, losses = small()
    groups = plan(network, batches[0], losses, ["seg", "scene"]).groups

    def order(**joint):
        values = unit_scores(scorer("taylor", **joint)(network, batches, losses, ["seg", "scene"]), groups)[JOINT]
        return torch.cat(list(values.values())).argsort(stable=True)

    even = order(seg=1.0, scene=1.0)
    assert torch.equal(even, order(seg=4.0, scene=4.0)) and torch.equal(even, order(depth=9.0))
    assert not torch.equal(even, order(seg=1.0, scene=50.0))


def test_the_model_is_left_as_it_is_and_scores_cover_all_that_the_tasks_use():
    network, batches, losses = small()
    network.train().requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    scores = scorer("taylor")(network, batches, losses, ["seg", "depth"])[JOINT]
    assert network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
    shapes = {n: p.shape for n, p in network.named_parameters()}
    assert all(s.shape == shapes[n] and s.dtype == torch.float32 for n, s in scores.items())
    assert {"stem.weight", "heads.seg.out.weight", "block1.depthwise.weight"} <= set(scores)
    assert not any(n.startswith(("heads.normal", "scene", "classify")) for n in scores)


def test_nothing_reached_is_worth_nothing():
    network, batches, losses = small()
    losses = {t: lambda out, batch: 0.0 * out.sum() for t in losses}
    assert not any(s.any() for s in scorer("taylor")(network, batches, losses, ["seg"])[JOINT].values())


class Bare(nn.Module):
    """A middle layer whose units own no entry alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(a, b, 1, bias=False) for a, b in ((3, 6), (6, 6), (6, 6), (6, 2))))

    def forward(self, image):
        return {"seg": self.layers(image)}


def test_a_group_without_an_entry_of_its_own_is_named():
    network, batch = Bare(), {"image": torch.randn(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"layers\.1 own no entry"):
        GroupImportance(GroupMagnitudeImportance)(network, [batch], {"seg": lambda o, b: o.sum()}, ["seg"])


def test_refusals():
    network, batches, losses = small()
    with pytest.raises(ValueError, match="GroupTaylorImportance needs gradients"):
        GroupImportance(GroupTaylorImportance)
    with pytest.raises(ValueError, match="GroupHessianImportance needs more"):
        GroupImportance(GroupHessianImportance, {})
    with pytest.raises(ValueError, match=r"norm.*allowed: p, group_reduction"):
        GroupImportance(GroupMagnitudeImportance, options={"norm": 2})
    with pytest.raises(ValueError, match="no scoring batches"):
        scorer("norm")(network, [], losses, ["seg"])
    with pytest.raises(ValueError, match="unknown task"):
        scorer("norm")(network, batches, losses, ["flow"])
    with pytest.raises(ValueError, match="'seg' is inf on batch 0"):
        scorer("taylor")(network, batches, {**losses, "seg": lambda o, b: o.sum() * 0 + torch.inf}, ["seg"])


def test_options_reach_the_importance():
    network, batches, losses = small()
    groups = plan(network, batches[0], losses, ["seg"]).groups
    plain, first = (
        unit_scores(GroupImportance(GroupMagnitudeImportance, options=o)(network, batches, losses, ["seg"]), groups)
        for o in (None, {"p": 1, "group_reduction": "first", "normalizer": None})
    )
    assert not torch.equal(plain[JOINT]["stem"], first[JOINT]["stem"])
    torch.testing.assert_close(first[JOINT]["stem"], network.stem.weight.detach().abs().sum((1, 2, 3)))
