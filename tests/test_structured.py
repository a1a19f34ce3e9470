"""Whole units end to end: every backbone halved, compacted, saved; the callback; channels first, weights after."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from cut.allocation import LayerSparsity
from cut.budget import Sparsity
from cut.checkpoint import load, save
from cut.compact import compact, keep_tasks
from cut.cost import cost
from cut.export import check_parity, export_onnx
from cut.limits import Bytes, MACs, Together
from cut.masks import apply_mask, sparsity
from cut.network import MultiTaskNet, NetworkConfig
from cut.pruning import Pruning
from cut.regrowth import Regrowth
from cut.schedules import Iterative, OneShot
from cut.scores import Magnitude, sensitivity
from cut.structured import Channels, make_unit_mask, plan
from cut.units import cut_units, weight_mask
from tests.small_networks import Cnn, trained
from tests.test_pruning import KeepMasks, build, fit

# timm's own tiny models stand in for their families where the real ones take long.
FAST = ["resnet18", "mobilenetv3_small_100", "test_byobnet", "test_convnext", "test_vit"]
SLOW = [
    "resnet34",
    "resnet50",
    "mobilenetv2_100",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "regnety_004",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "deit_tiny_patch16_224",
]
EXPORTED = ["resnet18", "test_vit"]  # of the fast ones, by make test: an export takes seconds
TASKS = ["seg", "scene"]


def network_of(backbone):
    torch.manual_seed(0)
    side = 28 if "patch14" in backbone else 32
    grid = (side, side) if "patch" in backbone or "vit" in backbone else None
    config = NetworkConfig(backbone, head_width=8, img_size=grid)
    network = trained(MultiTaskNet({"seg": 4, "depth": 1, "scene": 5}, ["scene"], config))
    g = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(2, 3, side, side, generator=g)}
    with torch.no_grad():
        goals = {t: torch.randn(o.shape, generator=g) for t, o in network(batch["image"]).items()}
    losses = {t: lambda out, _, goal=goal: F.l1_loss(out / out.detach().std(), goal) for t, goal in goals.items()}
    return network, batch, losses


def halved(backbone):
    """The network, its compact form with two of its three tasks and half of every group's units, and pictures."""
    network, batch, losses = network_of(backbone)
    groups = plan(network, batch, losses, TASKS).groups
    mask = weight_mask(network, groups, {g.name: torch.arange(g.units) % 2 == 0 for g in groups})
    return network, compact(network, TASKS, mask, batch), batch["image"]


@torch.no_grad()
def halved_vit():
    """A vision transformer without half of its heads and neurons, batches of pictures, and its outputs for the first.

    Its norms are fitted to the pictures, so that these matter to the outputs.
    """
    dense, small, x = halved("test_vit")
    for old, new in zip(dense.backbone.model.blocks, small.backbone.model.blocks, strict=True):
        assert new.attn.num_heads < old.attn.num_heads and new.mlp.fc1.out_features < old.mlp.fc1.out_features
    g = torch.Generator().manual_seed(3)
    pictures = [torch.randn(4, *x.shape[1:], generator=g) for _ in range(4)]
    small.train()
    for images in 10 * pictures:
        small(images)
    return small.eval(), pictures, small(pictures[0])


def relative(found, want):
    """The largest mean error of an output, as a share of what tells its pictures apart."""
    return max(
        float((torch.as_tensor(found[t]) - w).abs().mean() / (w - w.mean(0)).abs().mean()) for t, w in want.items()
    )


@torch.no_grad()
def difference(got, want):
    return max(float((got[t] - want[t]).abs().max() / want[t].abs().max().clamp_min(1e-30)) for t in want)


@pytest.mark.parametrize("backbone", [*FAST, *(pytest.param(b, marks=pytest.mark.slow) for b in SLOW)])
def test_every_backbone_is_halved_compacted_saved_and_loaded(backbone, tmp_path, request):
    network, batch, losses = network_of(backbone)
    scores = sensitivity(network, [batch], losses, TASKS)
    units = plan(network, batch, losses, TASKS)
    mask = make_unit_mask(network, scores, batch, losses, TASKS, budget=MACs(0.5), units=units)
    masked = copy.deepcopy(network)
    apply_mask(masked, mask)
    small = compact(network, TASKS, mask, batch)
    with torch.no_grad():
        x = torch.randn(3, *batch["image"].shape[1:], generator=torch.Generator().manual_seed(2))
        want = {t: o for t, o in masked(x).items() if t in TASKS}
        assert all(o.std() > 0 for o in want.values())
        assert difference(small(x), want) <= 1e-4
    counted = units.cost.amounts({n: ~gone for n, gone in cut_units(units.groups, mask).items()})
    true = cost(small, batch["image"])
    assert (counted["parameters"], counted["macs"]) == (true.params, true.macs)
    assert 0.4 * units.cost.dense["macs"] < true.macs <= 0.5 * units.cost.dense["macs"]
    assert not any(n.startswith("heads.depth") for n in mask), "a dropped head is not in the mask"
    save(small, tmp_path / "small")
    assert difference(load(tmp_path / "small")(x), small(x)) == 0
    if request.node.get_closest_marker("slow") or backbone in EXPORTED:
        exported(small, x, tmp_path / "small.onnx")


def exported(small, x, path):
    """The compact network's file gives its outputs, for another number of pictures than it was made with."""
    export_onnx(small, path, x[:1], tasks=TASKS)
    with torch.no_grad():
        largest = max(float(o.abs().max()) for o in small(x).values())
    worst = check_parity(path, small, [x], 1e-3 * max(1.0, largest))
    assert set(worst) == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [b for b in FAST if b not in EXPORTED])
def test_the_others_are_exported_too(backbone, tmp_path):
    _, small, x = halved(backbone)
    exported(small, x, tmp_path / "small.onnx")


def foreign():
    torch.manual_seed(0)
    network = trained(Cnn())
    batch = {"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    losses = {t: lambda out, _: out.square().mean() for t in ("seg", "depth", "normal", "scene")}
    return network, batch, losses


def test_a_foreign_network_and_a_subset_of_its_tasks():
    network, batch, losses = foreign()
    scores = sensitivity(network, [batch], losses, TASKS)
    mask = make_unit_mask(network, scores, batch, losses, TASKS, budget=MACs(0.5))
    masked = copy.deepcopy(network)
    apply_mask(masked, mask)
    small = compact(network, TASKS, mask, batch)
    want = {t: o for t, o in masked(batch["image"]).items() if t in TASKS}
    assert difference(small(batch["image"]), want) <= 1e-5
    dense = compact(network, TASKS, None, batch)
    assert cost(small, batch["image"]).macs <= 0.5 * cost(dense, batch["image"]).macs


def test_units_of_the_shared_part_own_their_slices_in_kept_heads_only():
    network, batch, losses = foreign()
    names = {s.name for g in plan(network, batch, losses, ["seg"]).groups for s in g.slots}
    assert "heads.seg.conv.weight" in names and not any(n.startswith(("heads.depth", "scene")) for n in names)


def test_floor_cap_and_rounding_hold_in_every_group():
    network, batch, losses = foreign()
    scores = sensitivity(network, [batch], losses, TASKS)
    units = plan(network, batch, losses, TASKS)
    mask = make_unit_mask(
        network, scores, batch, losses, TASKS, budget=MACs(0.4), floor_share=0.25, cap=0.75, rounding=4, units=units
    )
    for group in units.groups:
        left = group.units - int(cut_units(units.groups, mask)[group.name].sum())
        assert 0.25 * group.units <= left <= 0.75 * group.units
        assert left % 4 == 0 or 0.75 * group.units < 4, "where a group may keep so many"


def test_steps_of_a_schedule_only_cut_more():
    network, batch, losses = foreign()
    scores = sensitivity(network, [batch], losses, TASKS)
    units = plan(network, batch, losses, TASKS)
    mask = None
    for fraction in (0.3, 0.6, 1.0):
        new = make_unit_mask(
            network, scores, batch, losses, TASKS, budget=MACs(0.5), cut=mask, fraction=fraction, units=units
        )
        assert mask is None or all((mask[n] | ~m).all() for n, m in new.items())
        mask = new
        amounts = units.cost.amounts({n: ~gone for n, gone in cut_units(units.groups, mask).items()})
        share = amounts["macs"] / units.cost.dense["macs"]
        assert 1 - 0.5 * fraction - 0.05 < share <= 1 - 0.5 * fraction


def test_channels_first_then_weights_inside_them():
    network, batch, losses = foreign()
    scores = sensitivity(network, [batch], losses, TASKS)
    first = make_unit_mask(network, scores, batch, losses, TASKS, budget=MACs(0.6))
    both = make_unit_mask(network, scores, batch, losses, TASKS, budget=MACs(0.6), inside=Sparsity(0.8))
    assert all((m | ~both[n]).all() for n, m in first.items()), "what channels cut stays cut"
    assert sparsity(network, both, both) == pytest.approx(0.8, abs=1e-3)
    assert sparsity(network, first, first) < 0.75
    masked = copy.deepcopy(network)
    apply_mask(masked, both)
    want = {t: o for t, o in masked(batch["image"]).items() if t in TASKS}
    assert difference(compact(network, TASKS, both, batch)(batch["image"]), want) <= 1e-5


@pytest.mark.parametrize("scorer", [Magnitude(), None])
def test_the_callback_cuts_units_that_stay_dead(scorer, tmp_path):
    model, data = build()
    before = copy.deepcopy(model.network)
    pruning = Pruning(MACs(0.5), tasks=["seg", "depth"], scorer=scorer, batches=2, units="channels", rounding=4)
    fit(model, data, [pruning], tmp_path, 2)
    for name, p in model.network.named_parameters():
        if name in pruning.mask:
            assert not p[~pruning.mask[name]].any(), name
    batch = data.score_batches(1)[0]
    small = compact(model.network, ["seg", "depth"], pruning.mask, batch)
    dense = keep_tasks(before, ["seg", "depth"], batch)
    assert cost(small, batch["image"]).macs <= 0.5 * cost(dense, batch["image"]).macs
    small.eval(), model.network.eval()
    assert difference(small(batch["image"]), model.network(batch["image"])) <= 1e-4
    assert all(m.out_channels % 4 == 0 for n, m in small.backbone.named_modules() if isinstance(m, torch.nn.Conv2d))


def test_the_callback_cuts_units_by_a_schedule(tmp_path):
    model, data = build()
    keep = KeepMasks()
    pruning = Pruning(
        Together([MACs(0.5), Bytes(0.6)]),
        schedule=Iterative(rounds=3, final_sparsity=0.9),
        batches=2,
        units=Channels("mean"),
    )
    fit(model, data, [pruning, keep], tmp_path, 4)
    kept = [sum(int(m.sum()) for m in masks.values()) for masks in keep.masks]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    for old, new in zip(keep.masks, keep.masks[1:], strict=False):
        assert all((old[n] | ~m).all() for n, m in new.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": MACs(0.5)}, "needs units='channels'"),
        ({"budget": Bytes(0.5)}, "needs units='channels'"),
        ({"budget": Sparsity(0.5), "rounding": 8}, "rounding 8"),
        ({"budget": MACs(0.5), "units": "channel"}, "'weights', 'channels'"),
        ({"budget": LayerSparsity(0.5), "units": "channels"}, "LayerSparsity is not one"),
        ({"budget": MACs(0.5), "units": "channels", "rounding": 0}, "rounding 0"),
        ({"budget": MACs(0.5), "units": "channels", "cap": 0.0}, "cap 0.0"),
        ({"budget": MACs(0.5), "units": "channels", "cap": 0.3, "floor": 0.6}, "floor 0.6 is above cap 0.3"),
        ({"budget": MACs(0.5), "units": "channels", "regrowth": Regrowth(Magnitude())}, "regrowth"),
        ({"budget": MACs(0.5), "units": Channels(inside=MACs(0.4))}, "inside"),
    ],
)
def test_choices_that_do_not_fit_are_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        Pruning(**options)


def test_a_network_without_units_is_refused_before_training(tmp_path):
    model, data = build()
    for name, module in list(model.network.backbone.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent, _, key = name.rpartition(".")
            setattr(model.network.backbone.get_submodule(parent), key, torch.nn.GroupNorm(1, module.num_features))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="GroupNorm"):
        fit(model, data, [Pruning(MACs(0.5), batches=2, units="channels")], tmp_path, 1)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


class Steps(Callback):
    """Counts the steps of training."""

    taken = 0

    def on_train_batch_start(self, *_):
        self.taken += 1


def test_a_budget_that_no_choice_of_units_meets_is_refused_before_training(tmp_path):
    steps = Steps()
    model, data = build()
    late = Pruning(MACs(0.01), batches=2, units="channels", floor=0.5, schedule=OneShot(1))
    with pytest.raises(ValueError, match="out of reach"):
        fit(model, data, [late, steps], tmp_path, 3)
    assert steps.taken == 0


def test_what_keeps_layers_whole_is_named_where_it_makes_a_budget_impossible(tmp_path):
    steps = Steps()
    model, data = build()
    blocks = [n for n, m in model.network.backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for name in blocks[2:]:
        parent, _, key = name.rpartition(".")
        whole = model.network.backbone.get_submodule(name).num_features
        setattr(model.network.backbone.get_submodule(parent), key, torch.nn.GroupNorm(1, whole))
    with pytest.raises(ValueError, match=r"out of reach.*whole because of: .*(norm|bn).*GroupNorm"):
        fit(model, data, [Pruning(MACs(0.05), batches=2, units="channels"), steps], tmp_path, 1)
    assert steps.taken == 0
