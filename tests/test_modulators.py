"""Modulators: the start is the unchanged function, tasks do not touch each other, the cost is that of a 1x1 map."""

import pytest
import torch
import torch.nn.functional as F

from cut import checkpoint
from cut.budget import Sparsity
from cut.compact import compact
from cut.export import check_parity, export_onnx
from cut.masks import sparsity
from cut.modulators import (
    Modulator,
    ResponseModulators,
    modulated,
    modulated_convolutions,
    modulator_share,
    principal_directions,
    settle,
)
from cut.network import MultiTaskNet, NetworkConfig
from cut.pruning import Pruning
from cut.schedules import OneShot
from cut.sharing import shared
from cut.variants import VariantNet, deployed
from tests.small_networks import trained
from tests.test_pruning import build, fit
from tests.test_sharing import OUTPUTS, image, outputs, plain, same


def moved(network: VariantNet, seed: int = 1) -> VariantNet:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.variants.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return network


def batches(count: int = 2, size: int = 32):
    return [{"image": image(10 + i, size)} for i in range(count)]


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_start_is_the_unchanged_function(backbone, normalised):
    torch.manual_seed(0)
    net = MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig(backbone, head_width=8)).eval()
    network = modulated(net, batches(), normalised=normalised)
    before, after = outputs(net), outputs(network)
    assert all(torch.allclose(v, after[t], rtol=1e-4, atol=1e-4) for t, v in before.items())
    changed = modulated_convolutions(net.backbone)
    assert any(not torch.equal(m.weight, network.backbone.get_submodule(n).weight) for n, m in changed.items())


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])  # the second has biases and gates
def test_the_start_is_the_unchanged_function_of_trained_numbers_too(backbone):
    net = plain(backbone)
    for given in (batches(), None):
        before, after = outputs(net), outputs(modulated(net, given))
        assert all(torch.allclose(v, after[t], rtol=1e-4, atol=1e-4) for t, v in before.items())


def test_the_directions_are_those_of_the_outputs_variance():
    net = plain()
    found = principal_directions(net, batches())
    seen = {}
    handles = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.setdefault(n, []).append(o))
        for n, m in modulated_convolutions(net.backbone).items()
    ]
    for batch in batches():
        outputs(net, batch["image"])
    for handle in handles:
        handle.remove()
    assert set(found) == set(seen)
    for name, turn in found.items():
        rows = torch.cat([o.permute(0, 2, 3, 1).flatten(0, 2) for o in seen[name]]).double()
        turned = (rows - rows.mean(0)) @ turn.double()
        covariance = turned.T @ turned / len(rows)
        variance = covariance.diagonal()
        assert torch.allclose(turn.double() @ turn.double().T, torch.eye(len(turn)).double(), atol=1e-5)
        assert (covariance - torch.diag(variance)).abs().max() <= 1e-4 * variance.max()
        assert (variance[1:] <= variance[:-1] + 1e-6 * variance[0]).all()


def test_a_modulated_convolution_is_a_bank_and_a_1x1_convolution():
    net = plain("test_efficientnet")
    network = moved(modulated(net, batches()))
    seen = {}
    name = "blocks.3.0.conv_pwl"
    bank = network.backbone.get_submodule(name)
    modulator = network.variants["seg"].each()[name]
    handle = bank.register_forward_hook(lambda m, i, o: seen.update(x=i[0]))
    norm = network.backbone.get_submodule("blocks.3.0.bn3").register_forward_pre_hook(lambda m, i: seen.update(y=i[0]))
    network.select(["seg"])
    outputs(network)
    handle.remove(), norm.remove()
    directions = modulator.directions.detach()
    rows = [length * row / row.norm() for length, row in zip(modulator.lengths.detach(), directions, strict=True)]
    expected = F.conv2d(F.conv2d(seen["x"], bank.weight), torch.stack(rows)[:, :, None, None], modulator.bias)
    assert torch.allclose(seen["y"], expected, atol=1e-5)


def test_the_bank_is_frozen_and_all_of_a_task_learns():
    network = modulated(plain("test_efficientnet"), batches()).train()
    torch.stack([o.square().mean() for o in network(image()).values()]).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in network.backbone.parameters())
    assert [n for n, p in network.variants.named_parameters() if p.grad is None] == []


def test_a_dropped_task_leaves_the_others_to_the_bit_and_so_does_training_it():
    network = moved(modulated(plain(), batches()))
    before = outputs(network)
    network.train().select(["depth"])
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(image())["depth"].square().mean().backward()
    optimizer.step()
    network.select(list(OUTPUTS))
    after = outputs(network)
    assert not torch.equal(after["depth"], before["depth"])
    assert all(torch.equal(after[t], before[t]) for t in ("seg", "scene"))
    network.drop("depth")
    assert same(outputs(network), {t: before[t] for t in ("seg", "scene")})
    assert not any("depth" in n for n in network.state_dict())
    small = compact(network, ["seg"], None, image())
    assert torch.equal(outputs(small)["seg"], before["seg"]) and not any("scene" in n for n in small.state_dict())


def test_a_modulator_costs_a_ninth_of_a_3x3_bank_of_equal_channels():
    net = MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig("resnet18", head_width=8))
    share = modulator_share(modulated(net, None, ["seg"]))
    convolutions = {n: m for n, m in net.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert set(convolutions) - set(share) == {n for n in convolutions if "downsample" in n}
    for name, value in share.items():
        c = convolutions[name]
        equal = c.in_channels == c.out_channels and c.kernel_size == (3, 3)
        assert value == pytest.approx(1 / 9 if equal else c.out_channels**2 / c.weight.numel())
    assert sum(v == pytest.approx(1 / 9) for v in share.values()) == 13 and max(share.values()) <= 1


def test_depthwise_convolutions_and_expansions_have_no_modulator():
    net = MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig("mobilenetv2_100", head_width=8))
    share = modulator_share(modulated(net, None))
    assert all(n.endswith(("conv_pwl", "0.conv_pw")) for n in share) and len(share) == 17


@pytest.mark.parametrize("tasks", [["seg"], ["depth", "scene"]])
def test_what_is_deployed_is_counted_like_a_naive_loop(tasks):
    network = moved(modulated(plain("test_efficientnet"), batches()))
    expected = sum(p.numel() for p in network.backbone.parameters())
    for task in tasks:
        for name, p in network.named_parameters():
            own = name.startswith((f"heads.{task}.", f"variants.{task}."))
            expected += p.numel() if own and not name.endswith(".lengths") else 0
    assert deployed(network, tasks) == expected
    before = outputs(network)
    settle(network)
    assert same(before, outputs(network)), "lengths that are multiplied in change nothing"
    small = compact(network, tasks, None, image())
    assert sum(p.numel() for p in small.parameters()) == expected
    assert all(torch.equal(v, before[t]) for t, v in outputs(small).items())


def test_one_tasks_plain_network_has_the_products_and_no_modulators():
    network = moved(modulated(plain("test_efficientnet"), batches()))
    before = outputs(network)
    for task in OUTPUTS:
        single = network.plain(task)
        assert type(single) is MultiTaskNet
        assert torch.allclose(outputs(single)[task], before[task], rtol=1e-4, atol=1e-4)


def test_a_compact_network_is_saved_and_loaded_with_the_one_it_was_made_from(tmp_path):
    network = moved(modulated(plain("test_efficientnet"), batches()))
    small = compact(network, ["seg", "scene"], None, image())
    checkpoint.save(small, tmp_path)
    loaded = checkpoint.load(tmp_path, lambda: modulated(MultiTaskNet.from_spec(network.spec()), None))
    assert same(outputs(small), outputs(loaded))
    with pytest.raises(ValueError, match="builder"):
        checkpoint.load(tmp_path)
    checkpoint.save(network.plain("seg"), tmp_path / "single")
    assert same(outputs(network.plain("seg")), outputs(checkpoint.load(tmp_path / "single")))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda net: modulated(net, batches()), shared], ids=["modulated", "shared"])
def test_a_network_with_variants_is_exported(make, tmp_path):
    pytest.importorskip("onnxruntime")
    network = moved(make(plain())).eval()
    export_onnx(network, tmp_path / "model.onnx", image(), tasks=list(OUTPUTS))
    assert set(check_parity(tmp_path / "model.onnx", network, [image(3)])) == set(OUTPUTS)


def test_a_training_leaves_the_bank_alone(tmp_path):
    model, data = build()
    start = modulated(model.network, data.score_batches(1))
    fit(model, data, [ResponseModulators(batches=1)], tmp_path, 2)
    assert isinstance(model.network, VariantNet)
    banks = dict(model.network.backbone.named_parameters())
    assert all(torch.equal(p, banks[n]) for n, p in start.backbone.named_parameters())
    assert sum(p.numel() for p in model.network.parameters()) == deployed(model.network)


def test_the_bank_can_be_cut_for_the_tasks_that_are_kept(tmp_path):
    model, data = build()
    pruning = Pruning(Sparsity(0.5), tasks=["seg", "depth"], batches=2, schedule=OneShot(1))
    fit(model, data, [ResponseModulators(batches=1), pruning], tmp_path, 2)
    used = sparsity(model.network, pruning.mask, [n for n in pruning.mask if not n.startswith("heads.normal")])
    assert used == pytest.approx(0.5, abs=1e-3)
    assert all((p[~pruning.mask[n]] == 0).all() for n, p in model.network.named_parameters() if n in pruning.mask)
    before = outputs(model.network)
    small = compact(model.network, ["seg", "depth"], pruning.mask, image())
    assert all(torch.allclose(v, before[t], atol=1e-5) for t, v in outputs(small).items())


def test_what_is_not_allowed_is_refused():
    net = plain()
    with pytest.raises(ValueError, match="no batches"):
        modulated(net, [])
    with pytest.raises(ValueError, match="variants already"):
        modulated(modulated(net, None), None)
    with pytest.raises(ValueError, match="unknown task 'edge'"):
        modulated(net, None, ["edge"])
    with pytest.raises(ValueError, match="has no modulators"):
        modulator_share(net)
    with pytest.raises(ValueError, match="batches 0"):
        ResponseModulators(batches=0)
    with pytest.raises(ValueError, match="not finite"):
        modulated(net, [{"image": torch.full((1, 3, 32, 32), torch.inf)}])


def test_convolutions_that_change_their_weights_are_refused():
    torch.manual_seed(0)
    net = MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig("test_nfnet", head_width=8))
    with pytest.raises(ValueError, match="changes its convolutions' weights"):
        modulated(trained(net), batches())


def test_a_modulators_rows_keep_length_and_direction_apart():
    torch.manual_seed(0)
    start = torch.randn(4, 4)
    modulator = Modulator(start, None, normalised=True)
    assert torch.allclose(modulator.matrix, start, atol=1e-6)
    with torch.no_grad():
        modulator.directions.mul_(3)
    assert torch.allclose(modulator.matrix, start, atol=1e-6)
