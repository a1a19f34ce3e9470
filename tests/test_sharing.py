"""Sharing by layer: closed gates are the base to the bit, gradients are the formula's, what is deployed is counted."""

import lightning.pytorch as pl
import pytest
import torch

from cut import checkpoint
from cut.compact import compact
from cut.decomposition import prunable
from cut.network import MultiTaskNet, NetworkConfig
from cut.sharing import Delta, TaskSharing, gate, open_layers, penalty, settle, shared
from cut.variants import VariantNet, deployed
from tests.small_networks import trained
from tests.test_pruning import build, fit

OUTPUTS = {"seg": 3, "depth": 1, "scene": 4}


def plain(backbone: str = "test_resnet") -> MultiTaskNet:
    torch.manual_seed(0)
    net = MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig(backbone, head_width=8))
    return trained(net)


def image(seed: int = 0, size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def outputs(network, x=None) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return network.eval()(image() if x is None else x)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def moved(network: VariantNet, closed: float = 0.5, seed: int = 1) -> VariantNet:
    """Changes and norms as after a training, a share of the gates closed."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for variant in network.variants.values():
            for delta in variant.each():
                delta.change.copy_(torch.randn(delta.change.shape, generator=g) * 0.05)
                delta.score.fill_(0.05 if float(torch.rand((), generator=g)) < closed else 0.15)
            for p in variant.norms.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return network


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit"])
def test_the_start_and_closed_gates_are_the_base_to_the_bit(backbone):
    net = plain(backbone)
    x = image(size=160 if backbone == "test_vit" else 32)
    network = shared(net)
    assert same(outputs(net, x), outputs(network, x)), "all gates are open, all changes are zero"
    for norms in (True, False):
        network = shared(net, norms=norms)
        with torch.no_grad():
            for variant in network.variants.values():
                for delta in variant.each():
                    delta.change.normal_()
                    delta.score.fill_(0.0)
        assert same(outputs(net, x), outputs(network, x)), "all gates are closed, whatever the changes are"


def test_the_score_has_the_straight_through_gradient():
    torch.manual_seed(0)
    weight, x, target = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 4)
    for score, is_open in ((0.15, 1.0), (0.1, 1.0), (0.0999, 0.0), (-1.0, 0.0)):
        delta = Delta(weight, score, 0.1)
        delta.change.data.normal_()
        loss = ((x @ delta(weight).T - target) ** 2).sum()
        loss.backward()
        by_hand = 2 * (x @ (weight + is_open * delta.change.detach()).T - target).T @ x  # dL/dw
        assert delta.open == bool(is_open)
        assert torch.allclose(delta.score.grad, (by_hand * delta.change.detach()).sum(), rtol=1e-4)
        assert torch.allclose(delta.change.grad, is_open * by_hand, rtol=1e-4)


def test_a_gate_is_exact_and_counts_the_threshold_as_open():
    score = torch.tensor([0.3, 0.1, 0.09], requires_grad=True)
    value = gate(score, 0.1)
    assert value.tolist() == [1.0, 1.0, 0.0]
    (value * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert score.grad.tolist() == [1.0, 2.0, 3.0]


def test_the_base_is_frozen_and_all_else_of_a_task_learns():
    network = shared(plain()).train()
    torch.stack([o.square().mean() for o in network(image()).values()]).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in network.backbone.parameters())
    missing = [n for n, p in network.variants.named_parameters() if p.grad is None]
    assert missing == []


def test_training_moves_a_tasks_own_norms_and_no_others():
    network = shared(plain())
    before = {n: b.clone() for n, b in network.named_buffers()}
    network.train().select(["seg"])
    network(image())
    moved_buffers = {n for n, b in network.named_buffers() if not torch.equal(b, before[n])}
    heads = {n for n in moved_buffers if n.startswith("heads.seg.")}
    assert moved_buffers - heads and all(n.startswith("variants.seg.norms.") for n in moved_buffers - heads)


def test_shared_norms_are_frozen_with_their_statistics():
    net = plain()
    network = shared(net, norms=False).train()
    network(image())
    mine, theirs = network.backbone.state_dict(), net.backbone.state_dict()
    assert same(mine, theirs)
    assert network.heads.training and not any("norms" in n for n, _ in network.named_parameters())


def test_a_dropped_task_leaves_the_others_to_the_bit():
    network = moved(shared(plain()))
    before = outputs(network)
    network.drop("depth")
    after = outputs(network)
    assert set(after) == {"seg", "scene"} and all(torch.equal(v, before[t]) for t, v in after.items())
    assert not any("depth" in n for n in network.state_dict())
    network.drop("seg")
    with pytest.raises(ValueError, match="only one"):
        network.drop("scene")
    with pytest.raises(ValueError, match="unknown task 'seg'"):
        network.drop("seg")


@pytest.mark.parametrize("tasks", [["seg"], ["depth", "scene"], ["seg", "depth", "scene"]])
def test_what_is_deployed_is_counted_like_a_naive_loop(tasks):
    network = moved(shared(plain()))
    expected = sum(p.numel() for p in network.backbone.parameters())
    for task in tasks:
        for name, p in network.named_parameters():
            if name.startswith(f"heads.{task}.") or name.startswith(f"variants.{task}.norms."):
                expected += p.numel()
            if name.startswith(f"variants.{task}.deltas.") and name.endswith(".change"):
                score = network.get_parameter(name.removesuffix("change") + "score")
                expected += p.numel() if score.detach() >= 0.1 else 0
    assert deployed(network, tasks) == expected
    opened = open_layers(network)
    assert 0 < len(opened["seg"]) < len(prunable(network.backbone)) and opened["seg"] != opened["depth"]
    before = outputs(network)
    settle(network)
    assert same(before, outputs(network)), "final gates change nothing"
    assert open_layers(network) == opened
    small = compact(network, tasks, None, image())
    assert sum(p.numel() for p in small.parameters()) == expected, "a compact network holds what is counted"
    assert all(torch.equal(v, before[t]) for t, v in outputs(small).items())


def test_one_tasks_plain_network_gives_its_outputs():
    network = moved(shared(plain()))
    before = outputs(network)
    for task in OUTPUTS:
        single = network.plain(task)
        assert type(single) is MultiTaskNet and set(outputs(single)) == {task}
        assert torch.equal(outputs(single)[task], before[task])
    assert same(before, outputs(network))


def test_a_compact_network_is_loaded_with_the_one_it_was_made_from(tmp_path):
    network = moved(shared(plain()))
    settle(network)
    small = compact(network, ["seg", "scene"], None, image())
    checkpoint.save(small, tmp_path)

    def builder() -> VariantNet:
        whole = shared(MultiTaskNet.from_spec(network.spec()))
        settle(whole)
        return whole

    assert same(outputs(small), outputs(checkpoint.load(tmp_path, builder)))


def test_the_penalty_is_the_mean_over_layers_summed_over_tasks():
    network = moved(shared(plain()))
    by_task = {t: [float(d.score.detach()) for d in v.each()] for t, v in network.variants.items()}
    means = {t: sum(map(abs, s)) / len(s) for t, s in by_task.items()}
    assert float(penalty(network)) == pytest.approx(sum(means.values()), rel=1e-5)
    assert float(penalty(network, ["depth"])) == pytest.approx(means["depth"], rel=1e-5)
    settle(network)
    assert float(penalty(network)) == 0


@pytest.mark.parametrize(("weight", "some_close"), [(0.0, False), (50.0, True)])
def test_a_training_under_the_penalty_closes_layers_and_leaves_the_base_alone(weight, some_close, tmp_path):
    model, data = build()
    before = {n: p.detach().clone() for n, p in model.network.backbone.named_parameters()}
    layers = len(prunable(model.network.backbone))
    callback = TaskSharing(penalty=weight, warmup=0, speed=1.0)
    model.optimizer = lambda p: torch.optim.SGD(p, lr=0.02)
    fit(model, data, [callback], tmp_path, 3)
    assert isinstance(model.network, VariantNet) and not model.extras
    assert all(torch.equal(p, before[n]) for n, p in model.network.backbone.named_parameters())
    counts = [len(names) for names in open_layers(model.network).values()]
    assert (max(counts) < layers) == some_close
    assert sum(p.numel() for p in model.network.parameters()) == deployed(model.network)
    assert all(torch.isfinite(p).all() for p in model.network.parameters())


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_scores_move_as_many_times_as_far_as_the_speed_says(speed, tmp_path):
    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.scores = [float(d.score.detach()) for d in pl_module.network.variants["seg"].each()]

    ends = {}
    for value in (1.0, speed):
        model, data = build(dropout=0.0)
        keep = Keep()
        fit(model, data, [TaskSharing(0.3, 0, speed=value), keep], tmp_path, 1, trainer={"limit_train_batches": 1})
        ends[value] = torch.tensor(keep.scores) - 0.15
    assert ends[1.0].abs().min() > 0 and torch.allclose(ends[speed], speed * ends[1.0], rtol=1e-3, atol=1e-7)


def test_an_interrupted_training_goes_on_to_the_same_numbers(tmp_path):
    pl.seed_everything(1, verbose=False)
    model, data = build(dropout=0.0)
    whole = fit(model, data, [TaskSharing(warmup=1)], tmp_path, 2)
    end = {k: v.clone() for k, v in whole.lightning_module.state_dict().items()}

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    model, data = build(dropout=0.0)
    fit(model, data, [TaskSharing(warmup=1), Stop()], tmp_path, 2)
    model, data = build(dropout=0.0)
    fit(model, data, [TaskSharing(warmup=1)], tmp_path, 2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(end, model.state_dict())


def test_what_is_not_allowed_is_refused():
    net = plain()
    with pytest.raises(ValueError, match=r"threshold=0\.2"):
        shared(net, start=0.1, threshold=0.2)
    with pytest.raises(ValueError, match="penalty=-1"):
        TaskSharing(penalty=-1)
    with pytest.raises(ValueError, match="speed=0"):
        TaskSharing(speed=0)
    with pytest.raises(ValueError, match=r"start=0\.05"):
        TaskSharing(start=0.05)
    with pytest.raises(ValueError, match="unknown task 'edge'"):
        shared(net, ["edge"])
    with pytest.raises(ValueError, match="variants already"):
        shared(shared(net))
    with pytest.raises(ValueError, match="shares no layers"):
        penalty(net)
