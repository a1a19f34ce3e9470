"""New random weights, scores at initialisation, and rewinding."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from cut.budget import Sparsity
from cut.decomposition import prunable
from cut.initialisation import AtInitialisation, reinitialise
from cut.network import MultiTaskNet, NetworkConfig
from cut.pruning import Pruning
from cut.rewinding import Checkpoint, Fresh
from cut.schedules import Iterative, OneShot
from cut.scores import Magnitude, Sensitivity
from experiments.cell import CONFIGS
from tests.small_networks import Cnn, trained
from tests.test_pruning import build, fit, weights_of_kept, zeros
from tests.test_reference import LOSSES, batches


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(Cnn())


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("draw", ["default", "xavier"])
def test_the_seed_alone_decides_the_weights(model, draw):
    other = trained(Cnn(), seed=5)
    for net, before in ((model, 1), (other, 2)):
        torch.manual_seed(before)
        reinitialise(net, 3, draw)
    assert same(model.state_dict(), other.state_dict())
    reinitialise(other, 4, draw)
    assert not any(torch.equal(w, prunable(other)[n]) for n, w in prunable(model).items())


def test_every_layer_and_norm_starts_again(model):
    before = state(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.fill_(9)
    reinitialise(model)
    assert not any(torch.equal(w, before[n]) for n, w in prunable(model).items())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any() and not module.running_mean.any()
            assert (module.running_var == 1).all() and module.num_batches_tracked == 0


def test_the_default_draw_is_each_layers_own(model):
    """In the order of the modules, as building the same layers under the same seed does."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    reinitialise(model, 11)
    torch.manual_seed(11)
    for layer in layers:
        fresh = copy.deepcopy(layer)
        fresh.reset_parameters()
        assert torch.equal(fresh.weight, layer.weight)
        assert layer.bias is None or torch.equal(fresh.bias, layer.bias)


def test_the_xavier_draw_has_xaviers_variance():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(40, 60, 3), nn.Linear(300, 200))
    reinitialise(net, 0, "xavier")
    for layer, fans in zip(net, ((40 + 60) * 9, 500), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.03)
        assert abs(float(layer.weight.detach().mean())) < 0.05 * float(layer.weight.detach().std())


def test_global_randomness_is_untouched(model, monkeypatch):
    def fail(seed):
        raise AssertionError("a GPU's random state would not be put back")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    before = torch.get_rng_state()
    reinitialise(model, 8)
    Fresh(8)(model)
    AtInitialisation(Sensitivity(), seed=8)(model, batches(count=1), LOSSES, ["seg"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scorer", [Sensitivity(joint={"seg": 2.0}), Sensitivity(mode="train"), Magnitude()])
@pytest.mark.parametrize("draw", ["default", "xavier"])
def test_scores_at_initialisation_are_those_of_a_fresh_copy(model, scorer, draw):
    before, tasks = state(model), ["seg", "scene"]
    scores = AtInitialisation(scorer, seed=2, draw=draw)(model, batches(), LOSSES, tasks)
    assert same(model.state_dict(), before) and all(p.requires_grad and p.grad is None for p in model.parameters())
    fresh = copy.deepcopy(model)
    reinitialise(fresh, 2, draw)
    expected = scorer(fresh, batches(), LOSSES, tasks)
    assert scores.keys() == expected.keys()
    assert all(same(per, expected[t]) for t, per in scores.items())
    assert not any(same(per, scorer(model, batches(), LOSSES, tasks)[t]) for t, per in scores.items())


def scorer_of(method):
    """The scorer of a method's config."""
    spec = yaml.safe_load((CONFIGS / f"pruning/{method}.yaml").read_text())["pruning"]["scorer"]
    inner = Sensitivity(**spec["init_args"]["scorer"].get("init_args", {}))
    assert spec["class_path"] == "cut.initialisation.AtInitialisation"
    return AtInitialisation(**{**spec["init_args"], "scorer": inner})


def test_the_methods_that_score_at_initialisation_are_these():
    """Whoever adds one looks at what its scorer sees, below."""
    found = {p.stem for p in (CONFIGS / "pruning").glob("*.yaml") if "AtInitialisation" in p.read_text()}
    assert found == {"disparse-static", "snip-init"}


def spreads(scorer, network, tasks):
    """Standard deviation of what each norm puts out in front of its activation while a scorer runs, in order."""
    seen: list[float] = []

    def keep(module, inputs, output):
        # The norm's own arithmetic: timm's norms put their activation behind it.
        mean, var = module.running_mean, module.running_var
        training = module.training
        plain = F.batch_norm(inputs[0], None if training else mean, None if training else var, training=training)
        seen.append(float(plain.detach().std()))

    handles = [m.register_forward_hook(keep) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    g = torch.Generator().manual_seed(0)
    batch = {"image": torch.randn(4, 3, 64, 64, generator=g), "seg": torch.randint(3, (4, 64, 64), generator=g)}
    scores = scorer(network, [batch], LOSSES, tasks)
    for handle in handles:
        handle.remove()
    return seen, scores


@pytest.mark.parametrize("method", ["disparse-static", "snip-init"])
def test_activations_at_initialisation_neither_die_nor_explode(method):
    """A deep network without running statistics is scored with those of its batches, and keeps none of them."""
    torch.manual_seed(0)
    network = MultiTaskNet({"seg": 3}, [], NetworkConfig("mobilenetv2_100", weights=None, head="light", head_width=8))
    trained(network)
    before = state(network)
    scorer = scorer_of(method)
    seen, scores = spreads(scorer, network, ["seg"])
    assert len(seen) > 50 and all(0.9 < s < 1.1 for s in seen), seen
    assert same(network.state_dict(), before), "not even the running statistics"
    (per,) = scores.values()
    assert all(float(s.max()) > 0 for s in per.values())
    # The test sees what was wrong: with the statistics of a network that has seen nothing, the signal dies out.
    scorer.scorer.mode = "eval"
    assert min(spreads(scorer, network, ["seg"])[0]) < 1e-3


def test_an_unknown_draw_is_refused(model):
    for make in (
        lambda: reinitialise(model, draw="orthogonal"),
        lambda: AtInitialisation(Magnitude(), draw="orthogonal"),
        lambda: Fresh(draw="orthogonal")(model),
    ):
        with pytest.raises(ValueError, match="draw 'orthogonal'; allowed: 'default', 'xavier'"):
            make()


def snapshot(network: nn.Module, path) -> dict[str, torch.Tensor]:
    """Write a checkpoint as a dense run's snapshots are; returns the network's state."""
    kept = state(network)
    torch.save({"state_dict": {**{f"network.{k}": v for k, v in kept.items()}, "other": torch.ones(1)}}, path)
    return kept


def test_a_checkpoint_brings_back_weights_and_buffers(model, tmp_path):
    kept = snapshot(model, tmp_path / "epoch-0.ckpt")
    for where in (Checkpoint(str(tmp_path / "epoch-0.ckpt")), Checkpoint("epoch-0.ckpt", str(tmp_path))):
        trained(model, seed=9)
        model.norm.num_batches_tracked.add_(3)
        assert not same(model.state_dict(), kept)
        where(model)
        assert same(model.state_dict(), kept)


def test_a_missing_or_wrong_file_is_refused(model, tmp_path):
    before = state(model)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": 1}, tmp_path / "keyless.ckpt")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    snapshot(Cnn(width=12), tmp_path / "narrow.ckpt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.ckpt")  # not under "network."
    for name, message in [
        ("none.ckpt", "no snapshot .*none.ckpt to rewind to"),
        ("text.ckpt", "text.ckpt is no checkpoint"),
        ("empty.ckpt", "empty.ckpt is no checkpoint"),
        ("keyless.ckpt", "keyless.ckpt is no checkpoint"),
        ("list.ckpt", "list.ckpt is no checkpoint"),
        ("bare.ckpt", "bare.ckpt is of another network"),
        ("narrow.ckpt", "narrow.ckpt is of another network"),
    ]:
        with pytest.raises(ValueError, match=message):
            Checkpoint(name, str(tmp_path))(model)
        if name != "narrow.ckpt":
            assert same(model.state_dict(), before)


class AfterCut(pl.Callback):
    """Notes the network and whether the optimiser is fresh at the start of every epoch; goes behind Pruning."""

    def __init__(self) -> None:
        self.states, self.fresh, self.masks = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.states.append(state(pl_module.network))
        self.fresh.append(not trainer.optimizers[0].state)
        self.masks.append(dict(next(c for c in trainer.callbacks if isinstance(c, Pruning)).mask))


def test_a_cut_with_rewinding_goes_back_to_the_snapshot_under_the_mask(tmp_path):
    model, data = build()
    start = snapshot(model.network, tmp_path / "epoch-0.ckpt")
    rewind, watch = Checkpoint("epoch-0.ckpt", str(tmp_path)), AfterCut()
    schedule = Iterative(rounds=2, every=2, start=1, final_sparsity=0.8)  # cuts before epochs 1 and 3
    pruning = Pruning(Sparsity(0.8), tasks=["seg"], scorer=Magnitude(), schedule=schedule, batches=1, rewind=rewind)
    fit(model, data, [pruning, watch], tmp_path, 4)
    assert watch.fresh == [True, True, False, True]  # epoch 0 starts so anyway; epoch 2 goes on
    for epoch in (1, 3):
        mask = watch.masks[epoch]
        assert mask and any(not m.all() for m in mask.values())
        for name, value in watch.states[epoch].items():
            expected = start[name] * mask[name] if name in mask else start[name]
            assert torch.equal(value, expected), name
    assert not same(watch.states[2], watch.states[1])
    kept = weights_of_kept(model, ["seg"])
    assert zeros(pruning.mask, kept) == round(0.8 * sum(w.numel() for w in kept.values()))
    for name, p in model.network.named_parameters():
        if name in pruning.mask:
            assert not p[~pruning.mask[name]].any(), name
    assert any(not torch.equal(p, watch.states[3][n]) for n, p in kept.items())  # and it trains on


def test_without_rewinding_weights_and_optimiser_stay(tmp_path):
    model, data = build()
    watch = AfterCut()
    fit(model, data, [Pruning(Sparsity(0.5), tasks=["seg"], schedule=OneShot(1), batches=1), watch], tmp_path, 2)
    assert watch.fresh == [True, False]


def test_snip_at_initialisation_trains_from_the_weights_that_it_scored(tmp_path):
    model, data = build()
    dense = copy.deepcopy(model.network)
    watch = AfterCut()
    scorer = AtInitialisation(Sensitivity(joint={}), seed=4)
    pruning = Pruning(Sparsity(0.8), scorer=scorer, batches=1, rewind=Fresh(4))
    fit(model, data, [pruning, watch], tmp_path, 1)
    reinitialise(dense, 4)
    expected = Sensitivity(joint={})(dense, data.score_batches(1), model.losses, list(model.losses))["all"]
    assert all(torch.equal(s, expected[n]) for n, s in pruning.scores["all"].items())
    for name, value in watch.states[0].items():
        fresh = dense.state_dict()[name]
        assert torch.equal(value, fresh * pruning.mask[name] if name in pruning.mask else fresh), name
