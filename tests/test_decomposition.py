"""Decomposition and scoring by gradient: any topology, and no trace left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut.decomposition import check_tasks, components, forward, kept_parameters, owners, prunable
from cut.scores import Magnitude, Random, Sensitivity, sensitivity


class Toy(nn.Module):
    """A trunk with dropout and batch norm, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.trunk(x)
        return {"a": self.a(x), "b": self.b(x)}


class Frozen(Toy):
    """The trunk is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk.requires_grad_(False)


class Tied(Toy):
    """The heads share one weight; the trunk's first layer is tied to a layer inside head b."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 3)
        self.b.weight = self.a.weight


class Detached(Toy):
    """Head b reads a detached trunk."""

    def forward(self, x):
        x = self.trunk(x)
        return {"a": self.a(x), "b": self.b(x.detach())}


class CrossLink(Toy):
    """Head b reads head a's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(11, 2)

    def forward(self, x):
        x = self.trunk(x)
        a = self.a(x)
        return {"a": a, "b": self.b(torch.cat([x, a], 1))}


LOSSES = {t: (lambda out, batch, t=t: out.square().mean() + 0 * batch[0].sum()) for t in ("a", "b")}


def batches(n: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 6, generator=g),) for _ in range(n)]


@pytest.mark.parametrize(
    ("network", "shared", "only_a", "only_b"),
    [
        (Toy, {"trunk.0.weight"}, {"a.weight"}, {"b.weight"}),
        (Frozen, {"trunk.0.weight"}, {"a.weight"}, {"b.weight"}),
        (Tied, {"trunk.0.weight", "a.weight"}, set(), set()),
        (Detached, set(), {"trunk.0.weight", "a.weight"}, {"b.weight"}),
        (CrossLink, {"trunk.0.weight", "a.weight"}, set(), {"b.weight"}),
    ],
)
def test_gradients_decide_what_is_shared(network, shared, only_a, only_b):
    torch.manual_seed(0)
    model = network()
    frozen = [p.requires_grad for p in model.parameters()]
    used = owners(model, batches()[0], LOSSES, ["a", "b"])
    weights = set(prunable(model))
    assert used["a"] & used["b"] & weights == shared
    assert (used["a"] - used["b"]) & weights == only_a
    assert (used["b"] - used["a"]) & weights == only_b
    scores = sensitivity(model, batches(), LOSSES, ["a", "b"])
    assert {t: set(s) for t, s in scores.items()} == {t: set(used[t] & weights) for t in used}
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_a_detached_branch_stays_in_the_kept_part():
    used = owners(Detached(), batches()[0], LOSSES, ["a", "b"])
    kept = kept_parameters(Detached(), used, ["b"])
    assert "b.weight" in kept
    assert "a.weight" not in kept


def test_components_name_the_backbone_by_the_whole_model():
    used = owners(Toy(), batches()[0], LOSSES, ["a", "b"])
    parts = components(used, ["a"])
    assert parts["trunk.0.weight"] == "backbone"
    assert parts["a.weight"] == "a"
    assert "b.weight" not in parts


def test_a_weight_tied_to_an_embedding_is_not_prunable():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.out.weight = self.embed.weight
            self.free = nn.Linear(4, 4)

    assert set(prunable(Words())) == {"free.weight"}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_scoring_leaves_no_trace(mode):
    torch.manual_seed(0)
    model = Frozen().train()
    model.trunk[1].eval()
    before = copy.deepcopy(model.state_dict())
    grads = torch.zeros_like(model.a.weight)
    model.a.weight.grad = grads
    state = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        Sensitivity(mode)(model, batches(), LOSSES, ["a", "b"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert model.a.weight.grad is grads and model.b.weight.grad is None
    assert not model.trunk[0].weight.requires_grad and model.a.weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_scores_are_sums_over_batches_and_ignore_batch_order():
    torch.manual_seed(0)
    model, data = Toy(), batches(4)
    whole = sensitivity(model, data, LOSSES, ["a", "b"])
    parts = [sensitivity(model, [b], LOSSES, ["a", "b"]) for b in data]
    for task in whole:
        for name in whole[task]:
            torch.testing.assert_close(whole[task][name], sum(p[task][name] for p in parts))


def test_scores_equal_finite_differences_of_a_mask():
    torch.manual_seed(0)
    model, data = Toy().double().eval(), [tuple(x.double() for x in b) for b in batches(2)]
    scores = sensitivity(model, data, LOSSES, ["a"])["a"]["trunk.0.weight"]
    weight, step = model.trunk[0].weight, 1e-6
    for row, column in [(0, 0), (3, 5), (7, 2)]:
        expected = 0.0
        for batch in data:
            values = []
            for sign in (1, -1):
                old = weight[row, column].item()
                with torch.no_grad():
                    weight[row, column] = old * (1 + sign * step)
                    values.append(float(LOSSES["a"](model(batch[0])["a"], batch)))
                    weight[row, column] = old
            expected += abs(values[0] - values[1]) / (2 * step)
        assert scores[row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_magnitude_and_random_give_one_joint_ranking_over_the_kept_part():
    model = Toy()
    scores = Magnitude()(model, batches(), LOSSES, ["a"])
    assert set(scores) == {"all"} and set(scores["all"]) == {"trunk.0.weight", "a.weight"}
    assert torch.equal(scores["all"]["a.weight"], model.a.weight.abs())
    per_task = Magnitude(per_task=True)(model, batches(), LOSSES, ["a", "b"])
    assert set(per_task["b"]) == {"trunk.0.weight", "b.weight"}
    one, same = (Random(3)(model, batches(), LOSSES, ["a", "b"])["all"]["a.weight"] for _ in range(2))
    assert torch.equal(one, same) and one.min() > 0


class NotADict(Toy):
    def forward(self, x):
        return [self.trunk(x)]


def test_bad_input_is_refused_before_work():
    model, data = Toy(), batches()
    for tasks, message in [
        ([], "no tasks"),
        (["c"], "unknown task 'c'"),
        (["a", "a"], "twice"),
        ("ab", "no tasks"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_tasks(tasks, LOSSES)
        with pytest.raises(ValueError, match=message):
            sensitivity(model, data, LOSSES, tasks)
    with pytest.raises(ValueError, match="must return a dict"):
        forward(NotADict(), data[0])
    with pytest.raises(ValueError, match="no scoring batches"):
        sensitivity(model, [], LOSSES, ["a"])
    with pytest.raises(ValueError, match="no network input"):
        forward(model, {"picture": data[0][0]})
    with pytest.raises(ValueError, match="mode 'both'"):
        Sensitivity("both")


def test_a_loss_that_is_not_finite_names_task_and_batch():
    broken = {
        **LOSSES,
        "b": lambda out, batch: out.mean() / batch[0].sum().mul(0).add(batch[0][0, 0] != data[1][0][0, 0]),
    }
    data = batches()
    with pytest.raises(ValueError, match=r"task 'b' is (inf|-inf|nan) on batch 1"):
        sensitivity(Toy(), data, broken, ["a", "b"])


def test_dropout_matters_in_train_mode_only():
    torch.manual_seed(0)
    model = Toy()
    a, b = (Sensitivity("eval")(model, batches(), LOSSES, ["a"]) for _ in range(2))
    assert torch.equal(a["a"]["a.weight"], b["a"]["a.weight"])
    torch.manual_seed(1)
    c = Sensitivity("train")(model, batches(), LOSSES, ["a"])
    assert not torch.equal(a["a"]["a.weight"], c["a"]["a.weight"])


def test_functional_core_needs_no_lightning():
    import subprocess
    import sys

    code = "import sys, cut, cut.masks, cut.checkpoint, cut.network; assert 'lightning' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_forward_of_other_inputs():
    out = forward(Toy(), {"x": batches()[0][0]}, inputs=lambda b: b["x"])
    assert F.relu(out["a"]).shape == (5, 3)
