import copy

import pytest
import torch
from torch import nn

from cut.channels import remove_dead_channels
from cut.compact import compact, keep_tasks
from cut.masks import apply_mask
from cut.network import MultiTaskNet, NetworkConfig
from cut.reach import alive_inputs
from cut.stub import Stub, TaskSubset
from tests.small_networks import Block, Cnn, Head, Vit, random_mask, silenced, trained


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def num_params(model):
    return sum(p.numel() for p in model.parameters())


def masked(model, mask):
    model = copy.deepcopy(model)
    apply_mask(model, mask)
    return model.eval()


def inner(model):
    """The network without the filter over its outputs."""
    return model.module if isinstance(model, TaskSubset) else model


def image(seed=0, n=2, size=(32, 32)):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_equal_outputs(smaller, reference, tasks, sizes=((32, 32), (48, 40))):
    for seed, size in enumerate(sizes):
        x = image(100 + seed, 3, size)
        got, want = smaller(x), reference(x)
        assert set(got) == set(tasks)
        for task in tasks:
            assert want[task].std() > 0
            error = (got[task] - want[task]).abs().max() / want[task].abs().max()
            assert error <= 1e-5, (task, size, float(error))


# --------------------------------------------------------------------------------------------- dead channels


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("silent", [True, False])
def test_compact_equals_masked_model_at_borders_too(sparsity, silent):
    model = trained(Cnn(width=32))
    mask = random_mask(model, sparsity, seed=3)
    if silent:
        mask = silenced(model, mask, image())
    smaller = compact(model, ["seg", "scene"], mask, image())
    assert_equal_outputs(smaller, masked(model, mask), ["seg", "scene"])
    assert num_params(smaller) < num_params(keep_tasks(model, ["seg", "scene"], image()))


def test_channel_that_a_norm_leaves_constant_stays():
    """Zero weights, but a shift: the constant is uneven at the borders of the next, padded convolution."""
    model = trained(Cnn())
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n == "block1.expand.weight"}
    mask["block1.expand.weight"][:10] = False
    smaller = compact(model, ["seg"], mask, image())
    assert inner(smaller).block1.expand.out_channels == 48
    silent = silenced(model, mask, image())
    smaller = compact(model, ["seg"], silent, image())
    assert inner(smaller).block1.expand.out_channels == 38
    assert inner(smaller).block1.depthwise.groups == 38 and inner(smaller).block1.depthwise.weight.shape == (
        38,
        1,
        3,
        3,
    )
    assert inner(smaller).block1.norm2.running_var.shape == (38,)
    assert_equal_outputs(smaller, masked(model, silent), ["seg"])


def test_depthwise_bias_decides():
    """A zero channel leaves a depthwise convolution as a constant unless the norm is zero too."""
    model = trained(Cnn())
    mask = {}
    for name in ("block1.expand.weight", "block1.norm1.weight", "block1.norm1.bias"):
        mask[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
        mask[name][:5] = False
    assert inner(compact(model, ["seg"], mask, image())).block1.expand.out_channels == 48
    mask["block1.norm2.bias"] = torch.arange(48) >= 3  # the norm's mean still makes a constant
    assert inner(compact(model, ["seg"], mask, image())).block1.expand.out_channels == 48
    mask["block1.norm2.weight"] = torch.arange(48) >= 3
    assert inner(compact(model, ["seg"], mask, image())).block1.expand.out_channels == 45


def test_unread_channels_go_even_if_they_emit_something():
    model = trained(Cnn())
    mask = {"block2.project.weight": torch.ones(24, 48, 1, 1, dtype=torch.bool)}
    mask["block2.project.weight"][:, 7:20] = False
    smaller = compact(model, ["seg", "scene"], mask, image())
    assert inner(smaller).block2.expand.out_channels == inner(smaller).block2.project.in_channels == 35
    assert_equal_outputs(smaller, masked(model, mask), ["seg", "scene"])


def residual_mask(model, channels, producers):
    """Cuts rows of the layers that add to the residual stream, with the norms behind them."""
    mask = {}
    for conv, norm in producers:
        for name in (f"{conv}.weight", f"{norm}.weight", f"{norm}.bias"):
            mask[name] = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
            mask[name][channels] = False
    return mask


def test_all_that_is_added_goes_together_or_stays():
    model = trained(Cnn())
    every = [("stem", "norm"), ("block1.project", "block1.norm3"), ("block2.project", "block2.norm3")]
    smaller = compact(model, ["seg"], residual_mask(model, [1, 4], every[:2]), image())
    assert inner(smaller).stem.out_channels == 24
    mask = residual_mask(model, [1, 4], every)
    smaller = compact(model, ["seg", "scene"], mask, image())
    assert inner(smaller).stem.out_channels == inner(smaller).block2.project.out_channels == 22
    assert inner(smaller).gate.expand.out_channels == 22, "a gate on nothing goes, although it emits 0.5"
    assert inner(smaller).heads["seg"].conv.in_channels == 22 + 12
    assert inner(smaller).low[0].in_channels == 22
    assert_equal_outputs(smaller, masked(model, mask), ["seg", "scene"])


def test_channel_read_by_dropped_head_only_goes():
    model = trained(Cnn())
    mask = {"heads.seg.conv.weight": torch.ones(16, 36, 3, 3, dtype=torch.bool)}
    mask["heads.seg.conv.weight"][:, 24:30] = False
    assert inner(compact(model, ["seg"], mask, image())).low[0].out_channels == 6
    assert inner(compact(model, ["seg", "depth"], mask, image())).low[0].out_channels == 12


def test_flatten_needs_all_positions_dead():
    model = trained(Cnn())
    mask = {"classify.weight": torch.ones(5, 32, dtype=torch.bool)}
    mask["classify.weight"][:, :7] = False  # channel 0 has columns 0-3, channel 1 columns 4-7
    smaller = compact(model, ["scene"], mask, image())
    assert inner(smaller).scene[0].out_channels == 7 and inner(smaller).classify.in_features == 28
    assert_equal_outputs(smaller, masked(model, mask), ["scene"])


def test_one_channel_is_left_in_every_layer():
    model = trained(Cnn())
    mask = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n.startswith("block")}
    mask["heads.seg.conv.weight"] = torch.zeros(16, 36, 3, 3, dtype=torch.bool)
    smaller = compact(model, ["seg", "depth"], mask, image())
    assert inner(smaller).block1.expand.out_channels == 1 and inner(smaller).block2.depthwise.groups == 1
    assert all(0 not in p.shape for p in smaller.parameters())
    with torch.no_grad():
        assert (smaller(image(5))["depth"] - masked(model, mask)(image(5))["depth"]).abs().max() < 1e-5


def test_concatenation_keeps_one_input_in_all():
    """Each branch may go but for one channel, and what reads both must not end up empty either."""
    model = trained(Cnn())
    mask = {"heads.seg.conv.weight": torch.zeros(16, 36, 3, 3, dtype=torch.bool)}
    smaller = compact(model, ["seg"], mask, image())
    assert inner(smaller).low[0].out_channels >= 1 and inner(smaller).heads["seg"].conv.in_channels >= 1


def test_vit_neurons():
    model = trained(Vit())
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if ".mlp." in n or "qkv" in n}
    first, second = "backbone.blocks.0.mlp.", "backbone.blocks.1.mlp."
    mask[first + "fc1.weight"][:100] = mask[first + "fc1.bias"][:100] = False
    mask[first + "fc1.weight"][100:150] = False  # these still emit their bias
    mask[second + "fc2.weight"][:, 600:] = False
    mask["backbone.blocks.0.attn.qkv.weight"][:64] = False
    smaller = compact(model, ["seg"], mask, image())
    blocks = inner(smaller).backbone.blocks
    assert blocks[0].mlp.fc1.out_features == blocks[0].mlp.fc2.in_features == 768 - 100
    assert blocks[1].mlp.fc1.out_features == 600
    assert blocks[0].attn.qkv.out_features == 3 * 192
    assert_equal_outputs(smaller, masked(model, mask), ["seg"], sizes=((32, 32),))


def test_nothing_to_do_changes_nothing_and_twice_is_once():
    model = trained(Cnn())
    for name, p in compact(model, list(model(image())), None, image()).named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    mask = silenced(model, random_mask(model, 0.9, seed=3), image())
    once = compact(model, ["seg"], mask, image())
    twice = compact(once, ["seg"], None, image())
    assert {n: p.shape for n, p in once.named_parameters()} == {n: p.shape for n, p in twice.named_parameters()}


def test_tied_and_grouped_layers_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.c, self.d, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
            self.d.weight = self.c.weight

        def forward(self, x):
            return {"t": self.out(self.d(self.c(self.b(self.a(x)))))}

    model = trained(Odd())
    mask = {
        "c.weight": torch.ones(8, 8, 1, 1, dtype=torch.bool),
        "out.weight": torch.ones(2, 8, 1, 1, dtype=torch.bool),
    }
    mask["c.weight"][:, 0] = mask["out.weight"][:, 1] = False
    smaller = compact(model, ["t"], mask, image())
    assert smaller.d.weight is smaller.c.weight
    assert {n: p.shape for n, p in smaller.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_alive_inputs_by_brute_force():
    """If a channel is dead at a layer, changing the layer's weights for it changes no output."""
    model = masked(trained(Cnn(width=8)), random_mask(Cnn(width=8), 0.6, seed=1))
    alive = alive_inputs(model, image())
    for name in ("block1.expand", "gate.reduce", "heads.seg.conv"):
        for channel, lives in enumerate(alive[name].tolist()):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                weight = changed.get_submodule(name).weight
                weight[:, channel] *= 3
                before, after = model(image()), changed(image())
                differs = any(not torch.equal(before[t], after[t]) for t in before)
            assert lives or not differs, (name, channel)


def test_what_the_tracer_misses_is_undone():
    """The second head reads detached features: no gradient, no dependency is seen, and nothing breaks."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            with torch.no_grad():
                b = self.b(x)
            return {"a": self.a(x), "b": b}

    model = trained(Detached())
    mask = {"a.weight": torch.ones(2, 8, 1, 1, dtype=torch.bool)}
    mask["a.weight"][:, :4] = False
    smaller = compact(model, ["a", "b"], mask, image())
    assert inner(smaller).stem.out_channels == 8
    assert_equal_outputs(smaller, masked(model, mask), ["a", "b"])
    assert compact(model, ["a"], mask, image()).module.stem.out_channels == 4


def test_untraceable_network_is_returned_whole(monkeypatch):
    import torch_pruning

    def fail(*args, **kwargs):
        raise KeyError("no")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    model = trained(Cnn())
    mask = silenced(model, random_mask(model, 0.9), image())
    with pytest.warns(UserWarning, match="could not be traced"):
        smaller = remove_dead_channels(masked(model, mask), image())
    assert num_params(smaller) == num_params(model)


# -------------------------------------------------------------------------------------------- dropping tasks


class Foreign(nn.Module):
    """Head b reads head a's features; head c is added to a, detached; head d runs without gradients."""

    def __init__(self):
        super().__init__()
        self.stem = Block(3, 12)
        self.a, self.b, self.c, self.d = (
            Head(3, 2),
            nn.Conv2d(16, 2, 1),
            nn.Conv2d(3, 2, 1),
            nn.Conv2d(3, 2, 1),
        )
        self.seldom = nn.Linear(3, 3)

    def forward(self, x):
        f = self.stem(x)
        hidden = self.a.features(f)
        c = self.c(f)
        with torch.no_grad():
            d = self.d(f)
        return {"a": self.a.out(hidden) + c.detach(), "b": self.b(hidden), "c": c, "d": d}


def removed(model):
    return {n for n, m in model.named_modules() if isinstance(m, Stub)}


@pytest.mark.parametrize(
    ("tasks", "gone"),
    [
        (["a"], {"b", "d", "seldom"}),
        (["b"], {"a.out", "c", "d", "seldom"}),
        (["c"], {"a.conv", "a.norm", "a.out", "b", "d", "seldom"}),  # a.features is called
        (["d", "b"], {"a.out", "c", "seldom"}),
        (["a", "b", "c", "d"], {"seldom"}),
    ],
)
def test_foreign_network_keeps_what_the_outputs_need(tasks, gone):
    model = trained(Foreign())
    smaller = keep_tasks(model, tasks, image())
    assert removed(inner(smaller)) == gone
    assert_equal_outputs(smaller, model, tasks)
    for name, p in inner(smaller).named_parameters():
        assert torch.equal(p, model.get_parameter(name))


def test_module_dict_entries_are_deleted():
    smaller = keep_tasks(trained(Cnn()), ["depth", "scene"], image())
    assert list(smaller.heads) == ["depth"] and not isinstance(smaller, TaskSubset) and not removed(smaller)
    only = keep_tasks(trained(Cnn()), ["scene"], image())
    assert not any(n.startswith("heads.") for n, _ in only.named_parameters())


def test_tied_head_is_dropped_but_the_weight_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
            self.b.weight = self.a.weight
            self.b.bias = self.a.bias

        def forward(self, x):
            x = self.stem(x)
            return {"a": self.a(x), "b": self.b(x * 2)}

    smaller = keep_tasks(trained(Tied()), ["b"], image())
    assert isinstance(smaller.module.a, Stub) and smaller.module.b.weight.shape == (2, 4, 1, 1)


def test_model_is_left_as_it_is():
    model = trained(Cnn()).train()
    model.heads["depth"].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    smaller = compact(model, ["seg", "depth"], random_mask(model, 0.9), image())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not smaller.training and torch.equal(rng, torch.get_rng_state())
    assert [p.requires_grad for p in model.heads["depth"].parameters()] == [False] * 5
    assert not any(p.requires_grad for p in inner(smaller).heads["depth"].parameters())
    assert all(p.requires_grad for p in inner(smaller).block1.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *smaller.modules()])


def test_batches_and_inputs():
    model = trained(Cnn())
    expected = {n for n, _ in keep_tasks(model, ["seg"], image()).named_parameters()}
    for batch, inputs in [
        ({"image": image()}, None),
        ((image(), 0), None),
        ({"x": image()}, lambda b: b["x"]),
    ]:
        assert {n for n, _ in compact(model, ["seg"], None, batch, inputs=inputs).named_parameters()} == expected


@pytest.mark.parametrize(
    ("tasks", "mask", "match"),
    [
        (["seg", "pose"], None, "unknown task 'pose'"),
        (["seg", "seg"], None, "twice"),
        ([], None, "no tasks"),
        (["seg"], {"nothing.weight": torch.ones(1, dtype=torch.bool)}, "nothing.weight"),
        (["seg"], {"stem.weight": torch.ones(1, dtype=torch.bool)}, "stem.weight"),
    ],
)
def test_bad_arguments(tasks, mask, match):
    with pytest.raises(ValueError, match=match):
        compact(trained(Cnn()), tasks, mask, image())


def test_model_without_dict_output():
    with pytest.raises(ValueError, match="dict of task name"):
        compact(nn.Conv2d(3, 2, 1), ["seg"], None, image())


# ------------------------------------------------------------------------------------------ our own network


@pytest.mark.parametrize(
    ("backbone", "head", "size"),
    [
        ("mobilenetv2_050", "light", None),
        ("resnet10t", "aspp", None),
        ("vit_tiny_patch16_224", "light", (64, 64)),
    ],
)
def test_multi_task_net(backbone, head, size):
    config = NetworkConfig(backbone, head=head, head_width=16, img_size=size)
    model = trained(MultiTaskNet({"seg": 4, "depth": 1, "scene": 5}, ["scene"], config))
    x = image(size=(64, 64))
    mask = silenced(model, random_mask(model, 0.9, seed=1), x)
    smaller = compact(model, ["seg", "scene"], mask, x)
    assert isinstance(smaller, MultiTaskNet) and list(smaller.outputs) == ["seg", "scene"]
    sizes = [(64, 64)] if size else [(64, 64), (96, 64)]
    assert_equal_outputs(smaller, masked(model, mask), ["seg", "scene"], sizes)
    kept = keep_tasks(model, ["scene", "seg"], x)
    assert num_params(smaller) < (0.9 if size else 0.6) * num_params(kept) < num_params(model)
    for name, p in kept.named_parameters():
        assert torch.equal(p, model.get_parameter(name))


def test_heads_that_are_not_selected_go_too():
    model = trained(MultiTaskNet({"seg": 4, "depth": 1}, config=NetworkConfig("mobilenetv2_050", head_width=16)))
    model.select(["seg"])
    assert list(keep_tasks(model, ["seg"], image(size=(64, 64))).heads) == ["seg"]
    with pytest.raises(ValueError, match="unknown task 'depth'"):
        keep_tasks(model, ["depth"], image(size=(64, 64)))


def test_stub_follows_the_batch():
    stub = Stub(
        {
            "tuple": [
                {"tensor": [-1, 3], "dtype": "float32"},
                {"dict": {"x": {"tensor": [2], "dtype": "int64"}}},
            ]
        }
    )
    first, second = stub(torch.ones(7, 1))
    assert first.shape == (7, 3) and not first.any() and second["x"].dtype == torch.int64
