"""SynFlow against a naive double-precision implementation of the published procedure (arXiv 2006.05467)."""

import copy
import itertools

import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from cut.budget import Size, Sparsity
from cut.decomposition import prunable
from cut.fusion import Vote
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import JOINT, Magnitude
from cut.synflow import SynFlow, _flow, _linear, _ones
from tests.small_networks import trained
from tests.test_reference import LOSSES, batches

TASKS = ["seg", "scene"]


class Small(nn.Module):
    """Convolution, batch norm and ReLU twice, then a dense and an image-level head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na, self.act = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.b, self.nb = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.seg, self.depth, self.scene = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1), nn.Linear(8, 5)

    def forward(self, image):
        x = self.act(self.na(self.a(image)))
        x = self.act(self.nb(self.b(x)))
        up = {t: F.interpolate(getattr(self, t)(x), image.shape[-2:]) for t in ("seg", "depth")}
        return {**up, "scene": self.scene(x.mean((2, 3)))}


USED = ["a.weight", "b.weight", "scene.weight", "seg.weight"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(Small())


def flows(p: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each task's R of absolute weights, written out: nothing clips or shifts, batch norm only scales, all ones in."""
    x = F.conv2d(torch.ones(1, 3, 32, 32, dtype=torch.float64), p["a.weight"], padding=1)
    x = x * (p["na.weight"] / (p["na.running_var"] + 1e-5).sqrt())[:, None, None]
    x = F.conv2d(x, p["b.weight"], stride=2, padding=1)
    x = x * (p["nb.weight"] / (p["nb.running_var"] + 1e-5).sqrt())[:, None, None]
    seg = F.conv2d(x, p["seg.weight"]).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return torch.stack([seg.sum(), F.linear(x.mean((2, 3)), p["scene.weight"]).sum()])


def flow(p: dict[str, torch.Tensor]) -> torch.Tensor:
    """What is differentiated: the sum of the logarithms, in which every task counts the same."""
    return flows(p).log().sum()


def positive(model) -> dict[str, torch.Tensor]:
    return {n: v.detach().double().abs() for n, v in model.state_dict().items()}


def naive(p: dict[str, torch.Tensor], of=flow) -> dict[str, np.ndarray]:
    """|w x dR/d|w||."""
    leaves = {n: v.clone().requires_grad_(n in USED) for n, v in p.items()}
    grads = torch.autograd.grad(of(leaves), [leaves[n] for n in USED])
    return {n: (g * p[n]).numpy() for n, g in zip(USED, grads, strict=True)}


def naive_rounds(p: dict[str, torch.Tensor], final: float, rounds: int) -> dict[str, np.ndarray]:
    """The published loop: score under the mask, keep the best (1 - final)^(i / rounds) of all, again and again."""
    p = dict(p)
    total = sum(p[n].numel() for n in USED)
    for i in range(1, rounds + 1):
        scores = np.concatenate([s.ravel() for s in naive(p).values()])
        count = round(total * (1 - final) ** (i / rounds))
        threshold = np.sort(scores)[-count]
        assert threshold > 0 and (scores == threshold).sum() == 1
        start = 0
        for n in USED:
            part = scores[start : start + p[n].numel()].reshape(p[n].shape)
            p[n] = p[n] * torch.from_numpy(part >= threshold)
            start += part.size
    return {n: (p[n] != 0).numpy() for n in USED}


def ranking(scores) -> np.ndarray:
    assert list(scores) == [JOINT] and sorted(scores[JOINT]) == USED
    return np.concatenate([scores[JOINT][n].numpy().ravel() for n in USED])


def test_the_flow_of_one_round_equals_the_naive_one(model):
    expected = naive(positive(model))
    plain = _linear(model)
    found = _flow(plain, _ones(batches(count=1)[0]), TASKS, prunable(plain), [], None)
    assert sorted(found) == USED
    for n in USED:
        np.testing.assert_allclose(found[n].numpy(), expected[n], rtol=1e-10)
    # A flow is linear in each weight: differences give its derivative exactly.
    p, total = positive(model), flows(positive(model))
    for n, index in [("a.weight", (2, 1, 0, 2)), ("b.weight", (7, 3, 1, 1)), ("seg.weight", (1, 4, 0, 0))]:
        up, down = ({**p, n: p[n].clone()} for _ in range(2))
        up[n][index] += 0.25
        down[n][index] -= 0.25
        slope = float(((flows(up) - flows(down)) / 0.5 / total).sum())
        assert float(found[n][index]) == pytest.approx(float(p[n][index]) * slope, rel=1e-8)


def test_flows_that_are_added_as_they_are(model):
    plain = _linear(model)
    found = _flow(plain, _ones(batches(count=1)[0]), TASKS, prunable(plain), [], None, equal=False)
    expected = naive(positive(model), lambda p: flows(p).sum())
    for n in USED:
        np.testing.assert_allclose(found[n].numpy(), expected[n], rtol=1e-10)


@pytest.mark.parametrize("louder", [1.0, 1e6])
def test_every_task_has_the_same_flow_and_every_layer_all_of_it(model, louder):
    """The law of conservation, for each task: what flows through a layer that all of it passes is the task's whole."""
    with torch.no_grad():
        model.seg.weight.mul_(louder)  # a task is worth no more because its numbers are larger
    for tasks, shares in [(["seg"], {"seg"}), (["scene"], {"scene"}), (TASKS, {"seg", "scene"})]:
        plain = _linear(model)
        found = _flow(plain, _ones(batches(count=1)[0]), tasks, prunable(plain), [], None)
        sums = {n: float(s.sum()) for n, s in found.items()}
        assert sums == pytest.approx(
            {"a.weight": len(tasks), "b.weight": len(tasks), **{f"{t}.weight": 1 for t in shares}}
        )
    # Added as they are, the louder task has it all.
    plain = _linear(model)
    added = _flow(plain, _ones(batches(count=1)[0]), TASKS, prunable(plain), [], None, equal=False)
    seg, scene = flows(positive(model)).tolist()
    assert float(added["seg.weight"].sum()) == pytest.approx(seg)
    assert float(added["scene.weight"].sum()) == pytest.approx(scene)
    assert float(added["a.weight"].sum()) == pytest.approx(seg + scene)


def test_a_task_that_nothing_flows_to_has_no_share(model):
    with torch.no_grad():
        model.scene.weight.zero_()
    plain = _linear(model)
    found = _flow(plain, _ones(batches(count=1)[0]), TASKS, prunable(plain), [], None)
    assert {n: pytest.approx(float(s.sum())) for n, s in found.items()} == {
        "a.weight": 1,
        "b.weight": 1,
        "seg.weight": 1,
        "scene.weight": 0,
    }


def test_no_head_is_cut_to_nothing_because_another_is_louder(model):
    with torch.no_grad():
        model.seg.weight.mul_(1e6)
    total = sum(w.numel() for n, w in prunable(model).items() if n in USED)

    def kept(equal):
        scores = SynFlow(0.8, 20, equal)(model, batches(count=1), LOSSES, TASKS)
        return {n: float(m.float().mean()) for n, m in Sparsity(0.8).mask(scores, Vote(0.5), Size(total)).items()}

    quiet = kept(equal=True)
    assert quiet["scene.weight"] > 0.2 and quiet["seg.weight"] > 0.2
    assert kept(equal=False)["scene.weight"] == 0


def test_a_norms_scale_is_that_of_inference(model):
    """A convolution that is c times as large, with c^2 times the running variance behind it, is the same network."""
    scores = SynFlow(0.9, 5)(model, batches(count=1), LOSSES, TASKS)
    with torch.no_grad():
        for norm in (model.na, model.nb):
            norm.eps = 0.0
    first = ranking(SynFlow(0.9, 5)(model, batches(count=1), LOSSES, TASKS))
    with torch.no_grad():
        model.a.weight.mul_(torch.tensor([8.0, 0.125, 4.0, 1.0, 0.5, 2.0])[:, None, None, None])
        model.na.running_var.mul_(torch.tensor([64.0, 2.0**-6, 16.0, 1.0, 0.25, 4.0]))
    assert (ranking(SynFlow(0.9, 5)(model, batches(count=1), LOSSES, TASKS)) == first).all()
    assert (np.argsort(ranking(scores)) == np.argsort(first)).mean() > 0.9


def test_one_round_ranks_by_the_flow(model):
    found = ranking(SynFlow(0.5, rounds=1)(model, batches(count=1), LOSSES, TASKS))
    expected = np.concatenate([s.ravel() for s in naive(positive(model)).values()])
    assert (np.argsort(found) == np.argsort(expected)).all()
    np.testing.assert_allclose(np.sort(found), np.arange(1, len(found) + 1) / len(found), rtol=1e-6)


@pytest.mark.parametrize(("final", "rounds"), [(0.5, 1), (0.9, 10), (0.95, 40)])
def test_the_best_of_the_ranking_are_the_published_mask(model, final, rounds):
    scores = SynFlow(final, rounds)(model, batches(count=1), LOSSES, TASKS)
    total = sum(s.numel() for s in scores[JOINT].values())
    mask = Sparsity(final).mask(scores, Vote(0.5), Size(total))
    expected = naive_rounds(positive(model), final, rounds)
    for n in USED:
        assert (mask[n].numpy() == expected[n]).all(), n


def test_masks_of_lower_sparsities_contain_it(model):
    """What is cut in an earlier round is worth less than what is cut in a later one."""
    scores = SynFlow(0.9, 10)(model, batches(count=1), LOSSES, TASKS)
    total = sum(s.numel() for s in scores[JOINT].values())
    after = naive_rounds_prefix(positive(model), 0.9, 10, 5)
    kept = sum(int(m.sum()) for m in after.values())
    mask = Sparsity(1 - kept / total).mask(scores, Vote(0.5), Size(total))
    assert all((mask[n].numpy() == after[n]).all() for n in USED)


def naive_rounds_prefix(p, final: float, rounds: int, stop: int) -> dict[str, np.ndarray]:
    """The mask after ``stop`` rounds."""
    return naive_rounds(p, 1 - (1 - final) ** (stop / rounds), stop)


def test_the_model_is_unchanged_and_the_data_do_not_matter(model):
    model.train()
    model.a.weight.requires_grad_(False)
    before, forwards = copy.deepcopy(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    first = ranking(SynFlow(0.9, 5)(model, batches(seed=0), LOSSES, TASKS))
    other = [{**b, "image": b["image"] * 7 - 3, "seg": b["seg"] * 0} for b in batches(seed=1)]
    assert (ranking(SynFlow(0.9, 5)(model, other, LOSSES, TASKS)) == first).all()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert {n: type(m) for n, m in model.named_modules()} == forwards and model.na.training
    assert not any("forward" in vars(m) for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["a.weight"]
    assert all(p.grad is None for p in model.parameters())
    # Nor do signs, running means and shifts.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.where(torch.rand_like(p) < 0.5, -1.0, 1.0))
        model.na.running_mean.fill_(9.0)
        model.na.bias.fill_(5.0)
        model.b.bias.fill_(5.0)
    assert (ranking(SynFlow(0.9, 5)(model, batches(), LOSSES, TASKS)) == first).all()


class Chain(nn.Sequential):
    """Layers of very different sizes in a row, without biases."""

    def __init__(self, widths=(3, 4, 32, 32, 4, 2)) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        super().__init__(*layers[:-2])

    def forward(self, image):
        return {"seg": super().forward(image)}


def test_no_layer_of_a_chain_collapses_and_each_carries_the_same_flow():
    torch.manual_seed(0)
    net = trained(Chain())
    with torch.no_grad():
        for name, w in prunable(net).items():
            if w.numel() > 5000:
                w.mul_(10)  # the widest layer looks most important to a criterion that compares weights as they are
            else:
                assert w.numel() < 1200, name
    total, data = sum(w.numel() for w in prunable(net).values()), batches(count=1)
    plain = _linear(net)
    layers = _flow(plain, _ones(data[0]), ["seg"], prunable(plain), [], None)
    sums = [float(s.sum()) for s in layers.values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-9)  # the law that forbids the collapse

    def mask(scorer):
        scores = scorer(net, data, {"seg": lambda out, b: out.sum()}, ["seg"])
        return Sparsity(0.95).mask(scores, Vote(0.5), Size(total))

    kept = mask(SynFlow(0.95, 100))
    assert set(kept) == set(prunable(net)) and all(m.any() for m in kept.values())
    assert not all(m.any() for m in mask(Magnitude()).values())


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_networks_with_layer_norms_have_finite_scores(backbone):
    torch.manual_seed(0)
    config = NetworkConfig(backbone, head_width=8, img_size=(32, 32) if "vit" in backbone else None, resize="patch")
    net = MultiTaskNet({"seg": 3, "scene": 5}, ["scene"], config)
    scores = SynFlow(0.9, 3)(net, batches(count=1), LOSSES, TASKS)[JOINT]
    assert set(scores) == set(prunable(net))
    assert all(torch.isfinite(s).all() and (s > 0).all() and (s <= 1).all() for s in scores.values())


def test_a_layer_norm_of_maps_scales_channels():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.seg = nn.Conv2d(3, 4, 1, bias=False), timm.layers.LayerNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return {"seg": self.seg(self.n(self.a(x)))}

    torch.manual_seed(0)
    net = trained(Normed())
    plain = _linear(net)
    found = _flow(plain, {"image": torch.ones(1, 3, 4, 4).double()}, ["seg"], prunable(plain), [], None)
    a, n, seg = (w.detach().double().abs().squeeze().numpy() for w in (net.a.weight, net.n.weight, net.seg.weight))
    whole = seg @ (n * a.sum(1))
    np.testing.assert_allclose(
        found["a.weight"].squeeze().numpy(), a * (n * seg.sum(0))[:, None] / whole.sum(), rtol=1e-10
    )
    np.testing.assert_allclose(found["seg.weight"].squeeze().numpy(), seg * n * a.sum(1) / whole.sum(), rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: SynFlow(final=1.0), "final sparsity 1.0"),
        (lambda m: SynFlow(final=0.0), "final sparsity 0.0"),
        (lambda m: SynFlow(rounds=0), "rounds 0"),
        (lambda m: SynFlow()(m, [], LOSSES, TASKS), "no scoring batches"),
        (lambda m: SynFlow()(m, batches(), LOSSES, ["flow"]), "unknown task 'flow'"),
    ],
)
def test_bad_choices_are_refused(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)


def test_a_flow_that_is_not_finite_is_refused(model):
    with torch.no_grad():
        model.a.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        SynFlow()(model, batches(), LOSSES, TASKS)
