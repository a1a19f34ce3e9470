"""Variants of the score against naive autograd, one backward per task and batch."""

import copy
import itertools

import numpy as np
import pytest
import torch

from cut.decomposition import prunable
from cut.scores import JOINT, Magnitude, PerLayer, Sensitivity, sensitivity
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches

WEIGHTS = {"seg": 0.5, "depth": 3.0, "scene": 7.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(Cnn())


def products(model, data, weights: dict[str, float], power: int) -> dict[str, list[np.ndarray]]:
    """Weight name to gradient x weight^power of the weighted loss, one array a batch; absent if no gradient arrives."""
    net = copy.deepcopy(model).double().eval()
    found: dict[str, list[np.ndarray]] = {}
    for batch in data:
        net.zero_grad(set_to_none=True)
        outputs = net(batch["image"].double())
        labels = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        sum(w * LOSSES[t](outputs[t], labels) for t, w in weights.items()).backward()
        for name, p in prunable(net).items():
            if p.grad is not None:
                found.setdefault(name, []).append((p.grad * p.detach() ** power).numpy())
    return found


SUMS = {
    "absolute": lambda parts: sum(np.abs(p) for p in parts),
    "squared": lambda parts: sum(p**2 for p in parts),
    "signed": lambda parts: np.abs(sum(parts)),
}


def assert_same(scores, expected) -> None:
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert scores[name].dtype == torch.float32
        np.testing.assert_allclose(scores[name].numpy(), value, rtol=2e-3, atol=2e-5 * value.max(), err_msg=name)


@pytest.mark.parametrize(("how", "power"), [*itertools.product(SUMS, (0, 1, 2))])
def test_each_variant_equals_naive_gradients_of_each_task(model, how, power):
    data, tasks = batches(count=2), ["seg", "depth"]
    scores = sensitivity(model, data, LOSSES, tasks, accumulate=how, power=power)
    assert set(scores) == set(tasks)
    for task in tasks:
        parts = products(model, data, {task: 1.0}, power)
        assert_same(scores[task], {n: SUMS[how](p) for n, p in parts.items()})


@pytest.mark.parametrize("how", SUMS)
def test_a_joint_score_is_that_of_the_weighted_sum_of_losses(model, how):
    data, tasks = batches(count=2), ["seg", "depth", "normal"]
    scores = sensitivity(model, data, LOSSES, tasks, accumulate=how, joint=WEIGHTS)
    assert set(scores) == {JOINT} == {"all"}
    # A task without a weight counts with 1; a weight of a task that is not scored changes nothing.
    parts = products(model, data, {"seg": 0.5, "depth": 3.0, "normal": 1.0}, 1)
    assert_same(scores[JOINT], {n: SUMS[how](p) for n, p in parts.items()})
    assert "heads.normal.out.weight" in scores[JOINT] and "classify.weight" not in scores[JOINT]


def test_signed_gradients_of_opposite_batches_cancel(model):
    """The absolute value is taken of the sum over batches, not in it."""
    batch = batches(count=1)[0]
    losses = {"seg": lambda out, b: b["sign"] * LOSSES["seg"](out, b)}
    pair = [{**batch, "sign": 1.0}, {**batch, "sign": -1.0}]
    signed = sensitivity(model, pair, losses, ["seg"], accumulate="signed")["seg"]
    absolute = sensitivity(model, pair, losses, ["seg"])["seg"]
    assert all(not s.any() for s in signed.values()) and all(s.any() for s in absolute.values())
    other = sensitivity(model, batches(count=3), LOSSES, ["seg"], accumulate="signed")["seg"]
    bound = sensitivity(model, batches(count=3), LOSSES, ["seg"])["seg"]
    for name, value in other.items():
        assert (value >= 0).all() and (value <= bound[name] * (1 + 1e-4) + 1e-9).all()
        assert value.sum() < bound[name].sum()


def test_the_class_passes_its_choices_on(model):
    data, tasks = batches(count=2), ["seg", "depth"]
    for options in ({"accumulate": "squared", "power": 2}, {"joint": WEIGHTS, "mode": "train"}, {}):
        ours = Sensitivity(**options)(model, data, LOSSES, tasks)
        theirs = sensitivity(model, data, LOSSES, tasks, **options)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(s, theirs[t][n]) for t, per in ours.items() for n, s in per.items())


@pytest.mark.parametrize("options", [{"accumulate": "signed", "power": 2}, {"joint": WEIGHTS, "mode": "train"}])
def test_scoring_leaves_no_trace(model, options):
    model.train()
    model.block1.eval()
    model.stem.weight.requires_grad_(False)
    model.classify.weight.grad = torch.ones_like(model.classify.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    Sensitivity(**options)(model, batches(), LOSSES, ["seg", "scene"])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    graded = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(graded) == {"classify.weight"} and (graded["classify.weight"] == 1).all()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert model.training and model.block2.training and not model.block1.norm1.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": "mean"}, "accumulate 'mean'; allowed: 'absolute', 'squared', 'signed'"),
        ({"power": 3}, "power 3 of the weight"),
        ({"power": -1}, "power -1 of the weight"),
        ({"mode": "test"}, "mode 'test'"),
    ],
)
def test_bad_choices_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Sensitivity(**options)
    with pytest.raises(ValueError, match=message):
        sensitivity(model, batches(count=1), LOSSES, ["seg"], **options)


def test_a_joint_score_refuses_what_a_score_of_each_task_refuses(model):
    for tasks, data, message in [
        (["flow"], batches(count=1), "unknown task 'flow'"),
        (["seg"], [], "no scoring batches"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sensitivity(joint=WEIGHTS)(model, data, LOSSES, tasks)
    broken = {**LOSSES, "depth": lambda out, batch: out.sum() * float("nan")}
    with pytest.raises(ValueError, match="loss of task 'depth' is nan on batch 0"):
        Sensitivity(joint=WEIGHTS)(model, batches(count=1), broken, ["seg", "depth"])


@pytest.mark.parametrize("scorer", [Sensitivity(), Sensitivity(joint=WEIGHTS), Magnitude(per_task=True)])
def test_per_layer_scores_have_mean_1_and_the_same_order(model, scorer):
    data, tasks = batches(), ["seg", "scene"]
    plain, scaled = (s(model, data, LOSSES, tasks) for s in (scorer, PerLayer(scorer)))
    assert plain.keys() == scaled.keys()
    for task, per in plain.items():
        assert per.keys() == scaled[task].keys()
        for name, score in per.items():
            a, b = score.double().numpy().ravel(), scaled[task][name].double().numpy().ravel()
            assert b.mean() == pytest.approx(1.0, rel=1e-5), name
            np.testing.assert_allclose(b, a / a.mean(), rtol=1e-5)
            assert (np.diff(b[np.argsort(a, kind="stable")]) >= 0).all()


def test_per_layer_scores_of_a_layer_without_any_stay_zero(model):
    def scorer(*args):
        return {"all": {"a": torch.zeros(4), "b": torch.tensor([1.0, 3.0])}}

    scores = PerLayer(scorer)(model, [], LOSSES, ["seg"])["all"]
    assert scores["a"].tolist() == [0, 0, 0, 0] and scores["b"].tolist() == [0.5, 1.5]
