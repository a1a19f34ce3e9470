"""Units: what hangs together, per-task scores of units, and masks that cut them, against naive loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut.compact import compact
from cut.masks import apply_mask
from cut.network import MultiTaskNet, NetworkConfig
from cut.slots import Group, Slot
from cut.units import cut_units, find_groups, unit_scores, weight_mask
from tests.small_networks import Cnn, Vit, trained


class Grouped(nn.Module):
    """A grouped convolution, a flatten into a linear layer, and a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.grouped, self.b = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 8, 1)
        self.layer_norm = nn.GroupNorm(1, 8)
        self.c, self.out = nn.Conv2d(8, 4, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.norm(self.a(x)))))
        x = self.c(F.relu(self.layer_norm(self.b(x))))
        return {"t": self.out(F.adaptive_avg_pool2d(F.relu(x), 2).flatten(1))}


def by_name(groups):
    return {g.name: g for g in groups}


def image(size=32, n=2, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def choice(groups, share=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        kept[group.name] = torch.rand(group.units, generator=g) < share
        kept[group.name][0] = True
    return kept


def test_residual_sums_depthwise_and_concatenation_hang_together():
    groups = by_name(find_groups(trained(Cnn()), image()))
    names = {s.name for s in groups["stem"].slots}
    # the stem's channels go through both residual sums and the gate, into every head and the low branch
    assert {"stem.weight", "norm.running_mean", "block1.project.weight", "block2.norm3.bias", "low.0.weight"} <= names
    assert {f"heads.{t}.conv.weight" for t in ("seg", "depth", "normal")} | {
        "gate.expand.bias",
        "scene.0.weight",
    } <= names
    read = next(s for s in groups["stem"].slots if s.name == "heads.seg.conv.weight")
    assert read.dim == 1 and read.unit.tolist() == [*range(24), *[-1] * 12], "behind the 24 come 12 of another branch"
    low = next(s for s in groups["low.0"].slots if s.name == "heads.seg.conv.weight")
    assert low.unit.tolist() == [*[-1] * 24, *range(12)]
    hidden = {(s.name, s.dim) for s in groups["block1.expand"].slots}
    assert {("block1.depthwise.weight", 0), ("block1.project.weight", 1), ("block1.norm1.weight", 0)} <= hidden
    assert not any(n.startswith(("classify", "heads.seg.out")) for n in groups), "outputs are never cut"


def test_grouped_convolutions_lose_whole_groups_and_norms_over_channels_stop_what_they_read():
    groups = by_name(find_groups(trained(Grouped()), image(8)))
    assert groups["a"].units == 4 and groups["a"].width == 4
    both = {s.name: s.unit.tolist() for s in groups["a"].slots}
    assert both["grouped.weight"] == both["a.weight"] == [u for u in range(4) for _ in range(4)]
    assert "b" not in groups, "its channels are read by a norm over channels"
    linear = next(s for s in groups["c"].slots if s.name == "out.weight")
    assert linear.dim == 1 and linear.unit.tolist() == [u for u in range(4) for _ in range(4)], "a channel is 4 inputs"


def test_heads_and_neurons_of_a_vision_transformer_whose_width_its_forward_names():
    groups = by_name(find_groups(trained(Vit()), image()))
    assert {n.split(".", 3)[-1] for n in groups} == {"attn", "mlp.fc1"}
    heads = groups["backbone.blocks.0.attn"]
    assert (heads.units, heads.width) == (3, 64)
    rows = next(s for s in heads.slots if s.name.endswith("qkv.weight")).unit
    assert rows.tolist() == [h for _ in range(3) for h in range(3) for _ in range(64)]


def test_the_width_of_a_vision_transformer_is_a_group_with_its_embeddings_norms_and_readers():
    network = trained(MultiTaskNet({"seg": 4, "scene": 5}, ["scene"], NetworkConfig("test_vit", img_size=(32, 32))))
    groups = by_name(find_groups(network, image()))
    width = groups["backbone.model.patch_embed.proj"]
    assert width.units == 64
    slots = {(s.name.removeprefix("backbone.model."), s.dim) for s in width.slots}
    assert {("pos_embed", 2), ("cls_token", 2), ("blocks.0.norm1.bias", 0), ("blocks.5.norm2.weight", 0)} <= slots
    assert {("blocks.3.attn.qkv.weight", 1), ("blocks.3.attn.proj.weight", 0), ("blocks.5.mlp.fc2.bias", 0)} <= slots
    assert {("heads.seg.deep.0.weight", 1), ("heads.seg.early.0.weight", 1), ("heads.scene.out.weight", 1)} <= slots
    assert not any(n.startswith("heads.seg") for n, _ in slots - {(s.name, s.dim) for s in width.slots}), "nothing else"
    early, deep = (groups[f"heads.seg.{n}"] for n in ("early.0", "deep.6"))
    joined = [next(s.unit for s in g.slots if s.name == "heads.seg.join.1.weight") for g in (deep, early)]
    assert torch.equal(joined[0] >= 0, joined[1] < 0), "a concatenation in a head is not one of tokens"


def test_the_widths_of_convnext_s_stages_are_groups_with_their_layer_scales():
    network = trained(MultiTaskNet({"seg": 4}, config=NetworkConfig("test_convnext", head_width=8)))
    groups = by_name(find_groups(network, image()))
    widths = {n: groups[f"backbone.{n}"].units for n in ("stem_0", *(f"stages_{i}.downsample.1" for i in (1, 2, 3)))}
    assert list(widths.values()) == [24, 32, 48, 64]
    slots = {(s.name.removeprefix("backbone."), s.dim) for s in groups["backbone.stages_2.downsample.1"].slots}
    assert {("stages_2.blocks.0.conv_dw.weight", 0), ("stages_2.blocks.1.norm.weight", 0)} <= slots
    assert {("stages_2.blocks.3.mlp.fc2.weight", 0), ("stages_3.downsample.0.bias", 0)} <= slots


@pytest.mark.parametrize("make", [Cnn, Grouped, Vit])
def test_masked_and_compact_networks_agree_and_no_cut_unit_is_left(make):
    network = trained(make())
    size = 8 if make is Grouped else 32
    groups = find_groups(network, image(size))
    kept = choice(groups)
    mask = weight_mask(network, groups, kept)
    masked = copy.deepcopy(network)
    apply_mask(masked, mask)
    small = compact(network, list(network(image(size))), mask, image(size))
    with torch.no_grad():
        got, want = small(image(size, 3, 5)), masked(image(size, 3, 5))
    for task in want:
        assert (got[task] - want[task]).abs().max() <= 1e-5 * want[task].abs().max()
    left = {g.name: g.units for g in find_groups(small, image(size))}
    assert left == {n: int(k.sum()) for n, k in kept.items()}


def test_unit_scores_are_sums_means_and_sums_per_mac_within_units():
    groups = [Group("g", 2, (Slot("w", 0, torch.tensor([0, 0, 1])), Slot("v", 1, torch.tensor([1, -1, 0]))))]
    g = torch.Generator().manual_seed(0)
    scores = {
        "a": {"w": torch.rand(3, 2, generator=g), "v": torch.rand(2, 3, 1, generator=g)},
        "b": {"other": torch.ones(2)},
    }
    sums, counts = [0.0, 0.0], [0, 0]
    for slot in groups[0].slots:
        value = scores["a"][slot.name]
        for index in range(value.shape[slot.dim]):
            unit = int(slot.unit[index])
            if unit >= 0:
                part = value.select(slot.dim, index)
                sums[unit] += float(part.sum())
                counts[unit] += part.numel()
    found = unit_scores(scores, groups)
    assert set(found) == {"a"}, "task b uses no unit"
    assert found["a"]["g"].tolist() == pytest.approx(sums)
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    assert unit_scores(scores, groups, "mean")["a"]["g"].tolist() == pytest.approx(means)
    per_mac = unit_scores(scores, groups, "per_mac", {"g": torch.tensor([2.0, 4.0])})
    assert per_mac["a"]["g"].tolist() == pytest.approx([sums[0] / 2, sums[1] / 4])


@pytest.mark.parametrize("reduce", ["median", "per_mac"])
def test_wrong_reductions_are_refused(reduce):
    with pytest.raises(ValueError, match=reduce):
        unit_scores({"a": {}}, [], reduce)


def test_a_mask_says_which_units_it_cuts():
    network = trained(Cnn())
    groups = find_groups(network, image())
    kept = choice(groups, 0.7, seed=3)
    mask = weight_mask(network, groups, kept, ["classify.weight"])
    assert mask["classify.weight"].shape == network.classify.weight.shape
    assert all(torch.equal(~kept[n], gone) for n, gone in cut_units(groups, mask).items())


def test_finding_units_leaves_no_trace():
    network = trained(Cnn()).train()
    network.stem.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    find_groups(network, image())
    assert network.training and not network.stem.weight.requires_grad and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


def test_unknown_attention_and_networks_without_units_are_refused_by_name():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return {"t": self.mix(x, x, x)[0]}

    with pytest.raises(ValueError, match="mix \\(MultiheadAttention\\)"):
        find_groups(Mixed(), torch.randn(1, 5, 8))

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return {"t": self.out(self.norm(self.conv(x)))}

    with pytest.raises(ValueError, match="norm \\(GroupNorm\\)"):
        find_groups(Normed(), image(8))


def test_what_cannot_be_traced_is_refused_by_name():
    class Shy(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("not while one looks")
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), Shy()))
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return {"depth": self.head(self.trunk(x))}

    network = Net()
    with pytest.raises(ValueError, match=r"not while one looks.*stopped by trunk\.1\.1 \(Shy\)"):
        find_groups(network, torch.zeros(2, 3, 4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.slow
def test_window_attention_is_refused_by_name():
    network = MultiTaskNet({"seg": 3}, config=NetworkConfig("swin_tiny_patch4_window7_224", img_size=(224, 224)))
    with pytest.raises(ValueError, match="WindowAttention"):
        find_groups(network, torch.zeros(1, 3, 224, 224))
