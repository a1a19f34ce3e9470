"""Similarity: every measure against a naive reference, with its range, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut.library import Entry
from cut.network import MultiTaskNet, NetworkConfig
from cut.newcomer import Newcomer, class_labels, label_matrix, label_of, running
from cut.similarity import (
    CKA,
    LEEP,
    Everyone,
    GradientCosine,
    MaskOverlap,
    RandomSimilarity,
    cosine,
    iou,
    leep,
    linear_cka,
)

FACTS = {"units": "weights", "base": "b"}


def entry(name, task, mask, units="weights"):
    return Entry(name, {**FACTS, "task": task, "units": units}, mask)


# ---------------------------------------------------------------------------------------------------------- LEEP


def naive_leep(theta, labels):
    n, sources = theta.shape
    total = 0.0
    for i in range(n):
        inside = 0.0
        for z in range(sources):
            joint = sum(theta[j, z] for j in range(n) if labels[j] == labels[i]) / n
            mass = sum(theta[j, z] for j in range(n)) / n
            if mass > 0:
                inside += joint / mass * theta[i, z]
        total += math.log(inside)
    return total / n


@pytest.mark.parametrize("seed", range(5))
def test_leep_equals_the_naive_loop_and_is_never_positive(seed):
    rng = np.random.default_rng(seed)
    theta = rng.dirichlet(np.ones(6) * 0.3, 40)
    theta[:, 2] = 0  # a source class without mass
    theta /= theta.sum(1, keepdims=True)
    labels = rng.integers(0, 4, 40) * 3  # not consecutive
    found = leep(torch.from_numpy(theta), torch.from_numpy(labels))
    assert found == pytest.approx(naive_leep(theta, labels), rel=1e-10)
    assert found <= 0


def test_leep_ends_at_a_perfect_and_at_a_useless_source():
    labels = torch.arange(4).repeat(5)
    assert leep(F.one_hot(labels, 4).float(), labels) == pytest.approx(0)
    assert leep(F.one_hot(3 - labels, 7).float(), labels) == pytest.approx(0), "what classes are called does not matter"
    assert leep(torch.full((20, 3), 1 / 3), labels) == pytest.approx(math.log(1 / 4))
    with pytest.raises(ValueError, match="no labels"):
        leep(torch.zeros(0, 3), labels[:0])


class Classifiers(nn.Module):
    """Outputs that are read from the picture's first channels: one task sees the class, one does not."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return {"sees": image[:, 0, :2, 0] * 9, "blind": image[:, 1, :2, 0] * 9, "map": image, "new": image.mean(1)}


def picture_batches(count=2):
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        label = torch.randint(0, 2, (16,), generator=g)
        image = torch.rand(16, 3, 4, 4, generator=g)
        image[:, 0, :2, 0] = F.one_hot(label, 2).float()
        batches.append({"image": image, "new": label, "dense": (image[:, 0] > 0.5).long(), "depth": image[:, :1]})
    return batches


def test_leep_of_entries_ranks_the_task_that_tells_the_labels_apart():
    entries = [entry("a", "sees", {}), entry("b", "blind", {}), entry("c", "sees", {})]
    batches = picture_batches()
    found = LEEP()(Newcomer(Classifiers(), batches, {}, "new", entries))
    assert found["a"] == found["c"] > found["b"]
    theta = torch.cat([b["image"][:, 1, :2, 0] * 9 for b in batches]).double().softmax(1).numpy()
    labels = torch.cat([b["new"] for b in batches]).numpy()
    assert found["b"] == pytest.approx(naive_leep(theta, labels), rel=1e-6)
    other = LEEP(Classifiers())(Newcomer(nn.Identity(), batches, {}, "new", entries))
    assert other == found, "the classifiers may be another model's"


def test_leep_counts_dense_labels_by_pixel_without_unknown_ones():
    batches = picture_batches(1)
    unknown = {**batches[0], "dense": batches[0]["dense"].clone()}
    unknown["dense"][:, 2:] = 255
    found = LEEP()(Newcomer(Classifiers(), [unknown], {}, "dense", [entry("a", "map", {})]))
    theta = unknown["image"].softmax(1)[:, :, :2].movedim(1, -1).reshape(-1, 3)
    assert found["a"] == pytest.approx(naive_leep(theta.numpy(), unknown["dense"][:, :2].flatten().numpy()), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "source", "said"),
    [
        ("depth", "sees", "float32.*allowed: whole numbers"),
        ("new", "gone", "no output of library task 'gone'"),
        ("new", "map", "LEEP needs class scores"),
        ("dense", "sees", "LEEP needs class scores"),
        ("colour", "sees", "no label 'colour'"),
    ],
)
def test_leep_refuses_what_is_no_classification(task, source, said):
    with pytest.raises(ValueError, match=said):
        LEEP()(Newcomer(Classifiers(), picture_batches(), {}, task, [entry("a", source, {})]))


# --------------------------------------------------------------------------------------------- gradient cosine


class Linear(nn.Module):
    """One shared layer, a head for each task: gradients that can be written down."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.shared = nn.Linear(4, 3, bias=False)
        self.heads = nn.ParameterDict({t: nn.Parameter(torch.randn(3)) for t in ("new", "near", "far", "apart")})

    def forward(self, x):
        return {t: self.shared(x) @ h for t, h in self.heads.items()}


def linear_case():
    model = Linear().double()
    with torch.no_grad():
        model.heads["near"].copy_(2 * model.heads["new"])
        model.heads["far"].copy_(-model.heads["new"])
    batches = [(torch.randn(8, 4, dtype=torch.float64), {}) for _ in range(2)]
    losses = {t: lambda out, _: out.sum() for t in model.heads}
    entries = [entry(t, t, {"shared.weight": torch.ones(3, 4, dtype=torch.bool)}) for t in ("near", "far", "apart")]
    return model, batches, losses, entries


def test_gradient_cosine_of_a_linear_model_is_that_of_its_heads():
    model, batches, losses, entries = linear_case()
    found = GradientCosine()(Newcomer(model, batches, losses, "new", entries))
    total = sum(b[0].sum(0) for b in batches)
    grads = {t: torch.outer(h, total).flatten() for t, h in model.heads.items()}
    assert found["near"] == pytest.approx(1) and found["far"] == pytest.approx(-1)
    assert found["apart"] == pytest.approx(float(F.cosine_similarity(grads["new"], grads["apart"], 0)))
    assert all(p.grad is None for p in model.parameters())


def test_gradient_cosine_equals_finite_differences():
    model, batches, _, entries = linear_case()
    goals = {t: torch.randn(8, dtype=torch.float64) for t in model.heads}
    losses = {t: lambda out, _, goal=goal: (out - goal).square().mean() for t, goal in goals.items()}
    found = GradientCosine()(Newcomer(model, batches, losses, "new", entries))
    slopes = {t: [] for t in model.heads}
    weight = model.shared.weight.data
    for place in np.ndindex(3, 4):
        values = {}
        for step in (1e-5, -1e-5):
            weight[place] += step
            with torch.no_grad():
                values[step] = {t: sum(float(losses[t](model(b[0])[t], b)) for b in batches) for t in model.heads}
            weight[place] -= step
        for task in slopes:
            slopes[task].append((values[1e-5][task] - values[-1e-5][task]) / 2e-5)
    for task in ("near", "far", "apart"):
        a, b = np.array(slopes["new"]), np.array(slopes[task])
        assert found[task] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
        assert -1 <= found[task] <= 1


def test_gradient_cosine_needs_the_library_tasks_losses_and_knows_no_direction_of_zero():
    model, batches, losses, entries = linear_case()
    with pytest.raises(ValueError, match="no loss for library task 'apart'"):
        GradientCosine()(Newcomer(model, batches, {"new": losses["new"]}, "new", entries))
    flat = {**losses, "far": lambda out, _: out.sum() * 0}
    assert math.isnan(GradientCosine()(Newcomer(model, batches, flat, "new", entries))["far"])
    assert math.isnan(cosine({"w": torch.zeros(2)}, {"w": torch.ones(2)}))


# ------------------------------------------------------------------------------------------------ mask overlap


def test_mask_overlap_is_that_of_sets():
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 4), "b": (5, 3)}
    scores = {n: torch.rand(s, generator=g) for n, s in shapes.items()} | {"head": torch.rand(3, 3, generator=g)}
    entries = []
    for index, density in enumerate((0.1, 0.5, 0.9)):
        entries.append(entry(f"e{index}", "t", {n: torch.rand(s, generator=g) < density for n, s in shapes.items()}))
    found = MaskOverlap()(Newcomer(nn.Identity(), [], {}, "new", entries, scores))
    units = [(float(scores[n][p]), n, p) for n, s in shapes.items() for p in np.ndindex(*s)]
    for e in entries:
        theirs = {(n, p) for _, n, p in units if e.mask[n][p]}
        mine = {(n, p) for _, n, p in sorted(units, reverse=True)[: len(theirs)]}
        assert found[e.name] == pytest.approx(len(mine & theirs) / len(mine | theirs))
        assert 0 <= found[e.name] <= 1


def test_mask_overlap_of_a_tasks_own_mask_is_one_and_channels_count_by_rows():
    scores = {"a": torch.rand(6, 4), "b": torch.rand(5, 3)}
    flat = torch.cat([s.flatten() for s in scores.values()])
    edge = flat.sort(descending=True).values[9]
    own = entry("own", "t", {n: s >= edge for n, s in scores.items()})
    rows = {"a": torch.zeros(6, 4, dtype=torch.bool), "b": torch.zeros(5, 3, dtype=torch.bool)}
    sums = sorted(((float(s[i].sum()), n, i) for n, s in scores.items() for i in range(len(s))), reverse=True)
    for _, name, row in sums[:4]:
        rows[name][row, 1:] = True  # some inputs are cut too
    found = MaskOverlap()(Newcomer(nn.Identity(), [], {}, "new", [own, entry("rows", "t", rows, "channels")], scores))
    assert found == {"own": 1.0, "rows": 1.0}
    assert iou({"w": torch.zeros(3, dtype=torch.bool)}, {"w": torch.zeros(3, dtype=torch.bool)}) == 1.0
    with pytest.raises(ValueError, match="none of the weights"):
        MaskOverlap()(Newcomer(nn.Identity(), [], {}, "new", [own], {"c": torch.ones(2, 2)}))


def test_mask_overlap_scores_the_new_task_itself_if_need_be():
    model, batches, losses, entries = linear_case()
    found = MaskOverlap()(Newcomer(model, batches, losses, "new", entries))
    assert found == dict.fromkeys(found, 1.0), "all is kept"


# --------------------------------------------------------------------------------------------------------- CKA


def naive_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@pytest.mark.parametrize("seed", range(4))
def test_linear_cka_equals_numpy_and_ignores_rotation_and_scale(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(30, 7)) + 3, rng.normal(size=(30, 4))
    found = linear_cka(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(naive_cka(x, y), rel=1e-9) and 0 <= found <= 1
    turn = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    assert linear_cka(torch.from_numpy(x @ turn * 5 + 2), torch.from_numpy(y * -3)) == pytest.approx(found, rel=1e-9)
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(x @ turn)) == pytest.approx(1)
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(
        linear_cka(torch.from_numpy(y), torch.from_numpy(x))
    )
    assert math.isnan(linear_cka(torch.ones(5, 2), torch.rand(5, 2)))


def test_cka_of_an_entry_is_that_of_the_features_its_mask_leaves():
    model, _, losses, _ = linear_case()
    x = torch.randn(20, 4, dtype=torch.float64)
    batches = [(x[:12], {"new": x[:12, 0]}), (x[12:], {"new": x[12:, 0]})]
    g = torch.Generator().manual_seed(0)
    entries = [entry(f"e{i}", "t", {"shared.weight": torch.rand(3, 4, generator=g) < 0.5}) for i in range(3)]
    before = model.shared.weight.detach().clone()
    found = CKA()(Newcomer(model, batches, losses, "new", entries))
    for e in entries:
        features = x @ (model.shared.weight.detach() * e.mask["shared.weight"]).T
        assert found[e.name] == pytest.approx(naive_cka(features.numpy(), x[:, :1].numpy()), rel=1e-6)
    assert torch.equal(model.shared.weight, before)
    with pytest.raises(ValueError, match="two labelled pictures"):
        CKA()(Newcomer(model, [(x[:1], {"new": x[:1, 0]})], losses, "new", entries))


def test_cka_reads_what_our_networks_head_gets_and_takes_any_label():
    torch.manual_seed(0)
    network = MultiTaskNet({"seg": 3, "new": 4}, ["new"], NetworkConfig("test_resnet", head_width=8)).eval()
    network.select(["new"])
    g = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(6, 3, 32, 32, generator=g),
        "new": torch.arange(6) % 4,
        "map": torch.randint(0, 3, (6, 32, 32), generator=g),
        "depth": torch.rand(6, 1, 32, 32, generator=g),
    }
    names = [n for n, p in network.named_parameters() if p.dim() == 4 and n.startswith("backbone")]
    parameters = dict(network.named_parameters())
    masks = [{n: torch.rand(parameters[n].shape, generator=g) < d for n in names} for d in (0.8, 1.1)]
    entries = [entry(f"e{i}", "seg", m) for i, m in enumerate(masks)]
    found = CKA()(Newcomer(network, [batch], {}, "new", entries))
    features = network.backbone(batch["image"])[-1].mean((2, 3)).detach().double().numpy()
    wanted = naive_cka(features, F.one_hot(batch["new"]).double().numpy())
    assert found["e1"] == pytest.approx(wanted, rel=1e-4) and found["e0"] != pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------------- controls


def test_controls_depend_on_content_alone():
    g = torch.Generator().manual_seed(0)
    masks = [{"w": torch.rand(8, 8, generator=g) < 0.5} for _ in range(200)]
    entries = [entry(f"e{i}", "t", m) for i, m in enumerate(masks)]
    renamed = [entry(f"x{i}", "t", m) for i, m in enumerate(masks)][::-1]
    numbers = RandomSimilarity(3)(Newcomer(nn.Identity(), [], {}, "new", entries))
    again = RandomSimilarity(3)(Newcomer(nn.Identity(), [], {}, "new", renamed))
    assert [numbers[f"e{i}"] for i in range(200)] == [again[f"x{i}"] for i in range(200)]
    values = np.array(list(numbers.values()))
    assert values.min() >= 0 and values.max() < 1 and 0.4 < values.mean() < 0.6 and len(set(values)) == 200
    assert RandomSimilarity(4)(Newcomer(nn.Identity(), [], {}, "new", entries)) != numbers
    assert set(Everyone()(Newcomer(nn.Identity(), [], {}, "new", entries)).values()) == {1.0}


# ------------------------------------------------------------------------------------------------------ labels


def test_labels_are_found_in_dicts_and_pairs():
    label = torch.arange(3)
    for batch in ({"image": label, "t": label}, (label, {"t": label}), [label, label]):
        assert torch.equal(label_of(batch, "t"), label)
    for batch in ({"image": label}, (label, {"u": label}), (label,), (label, 3), {"t": "text"}, {"t": torch.tensor(1)}):
        with pytest.raises(ValueError, match="no label 't'"):
            label_of(batch, "t")
    for wrong in (torch.rand(3), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"labels of task 't'.*allowed"):
            class_labels({"t": wrong}, "t")


def test_label_matrix_is_one_hot_or_averaged_over_cells():
    classes = label_matrix(torch.tensor([0, 2, 255, 1]))
    assert classes.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert label_matrix(torch.tensor([0.5, 2.0])).tolist() == [[0.5], [2.0]]
    depth = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(label_matrix(depth), F.avg_pool2d(depth, 2).double().flatten(1))
    seg = torch.zeros(1, 8, 8, dtype=torch.long)
    seg[:, :, 4:] = 1
    shares = label_matrix(seg).view(2, 4, 4)
    assert torch.equal(shares[1], 1 - shares[0]) and shares[0, :, :2].eq(1).all() and shares[0, :, 2:].eq(0).all()
    assert torch.isfinite(label_matrix(torch.tensor([float("nan"), float("inf")]))).all()
    with pytest.raises(ValueError, match="allowed: classes or numbers"):
        label_matrix(torch.ones(2, dtype=torch.complex64))


def test_all_heads_run_within_and_the_selection_comes_back():
    network = MultiTaskNet({"seg": 3, "new": 4}, ["new"], NetworkConfig("test_resnet", head_width=8))
    network.select(["new"])
    with pytest.raises(RuntimeError), running(network):
        assert network.active == ["seg", "new"]
        raise RuntimeError
    assert network.active == ["new"]
    with running(nn.Identity()):
        pass
