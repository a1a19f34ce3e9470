"""Recovery under guidance: the dense model as a teacher, and small towers beside the heads."""

import copy
import dataclasses

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel

from cut.budget import Sparsity
from cut.data.synthetic import Synthetic
from cut.distillation import Distillation, imitation
from cut.initialisation import AtInitialisation
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from cut.pruning import Pruning
from cut.schedules import OneShot
from cut.scores import Sensitivity
from cut.synflow import SynFlow
from cut.tasks import classification, depth, normals, regression_map, segmentation
from cut.towers import SmallTowers
from tests.test_pruning import build, fit

MAPS = [segmentation(["a", "b", "c"]), normals(), depth(), regression_map("edge")]


def build_with_scene() -> tuple[MultiTaskModel, Synthetic]:
    pl.seed_everything(7, verbose=False)
    data = Synthetic(("seg", "normal", "depth", "scene"), size=(32, 32), num=16, batch_size=8, seed=3)
    config = NetworkConfig(backbone="test_resnet", head_width=8, dropout=0.1)
    return MultiTaskModel(data.tasks, config, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)), data


def state(module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def outputs(channels: int, dense: bool = True, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *((4, 5) if dense else ()), generator=g) * scale


@pytest.mark.parametrize("task", [*MAPS, classification(["x", "y"])], ids=lambda t: t.name)
def test_imitation_is_zero_for_equal_outputs_only(task):
    teacher, other = (outputs(task.channels, task.dense, s) for s in (0, 1))
    assert float(imitation(task, teacher.clone(), teacher)) == pytest.approx(0, abs=1e-6)
    assert float(imitation(task, other, teacher)) > 0.01
    student = other.clone().requires_grad_(True)
    imitation(task, student, teacher).backward()
    closer = student.detach() - 0.1 * student.grad
    assert imitation(task, closer, teacher) < imitation(task, other, teacher)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("dense", [True, False])
def test_imitation_of_classes_is_the_divergence(temperature, dense):
    task = MAPS[0] if dense else classification(["a", "b", "c"])
    student, teacher = (outputs(3, dense, s) for s in (1, 2))

    def softmax(x):
        e = np.exp(x.double().numpy() / temperature)
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2
    assert float(imitation(task, student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_imitation_of_a_certain_teacher_is_finite():
    student = outputs(3).requires_grad_(True)
    teacher = F.one_hot(torch.zeros(2, 4, 5, dtype=torch.long), 3).permute(0, 3, 1, 2) * 1e4
    loss = imitation(MAPS[0], student, teacher.float(), 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    expected = -F.log_softmax(student.detach(), 1)[:, 0].mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_imitation_of_normals_and_maps():
    a, b = (outputs(3, seed=s).double().numpy() for s in (1, 2))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    mine, theirs = outputs(3, seed=1), outputs(3, seed=2)
    assert float(imitation(MAPS[1], mine, theirs)) == pytest.approx((1 - cosine).mean(), rel=1e-5)
    assert float(imitation(MAPS[1], 5 * theirs, theirs)) == pytest.approx(0, abs=1e-6)  # length does not matter
    for task in MAPS[2:]:
        assert float(imitation(task, mine, theirs)) == pytest.approx(np.abs(a - b).mean(), rel=1e-5)


def test_the_term_is_the_weighted_sum_over_tasks_and_features():
    model, data = build_with_scene()
    model.eval()
    model.select(["seg", "normal", "scene"])
    weights = dict(zip(model.tasks, (1.0, 3.0, 9.0, 0.5), strict=True))
    model.tasks = {n: dataclasses.replace(t, weight=weights[n]) for n, t in model.tasks.items()}
    guide = Distillation(weight=0.7, features=0.2, temperature=3.0)
    guide.setup(None, model, "fit")
    guide.on_fit_start(None, model)
    teacher = copy.deepcopy(guide.teacher)
    assert model.extras == [guide.loss] and teacher.active == ["seg", "normal", "scene"]
    batch = data.score_batches(1)[0]
    equal = guide.loss(batch, model(batch["image"]))
    assert float(equal.detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for p in model.network.parameters():
            p.mul_(1 + 0.2 * torch.randn(p.shape))
    found = model(batch["image"])
    value = guide.loss(batch, found)
    with torch.no_grad():
        wanted = teacher(batch["image"])
        mine, theirs = (n.backbone(batch["image"])[-1] for n in (model.network, teacher))
        expected = 0.2 * ((mine - theirs) ** 2).mean() / theirs.var()
        for name, weight in (("seg", 1.0), ("normal", 3.0), ("scene", 0.5)):
            expected += 0.7 * weight * imitation(model.tasks[name], found[name], wanted[name], 3.0)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)
    value.backward()
    assert model.network.backbone.conv1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in guide.teacher.parameters())
    guide.on_fit_end(None, model)
    assert not model.extras and not model.network.backbone._forward_hooks


def test_the_teacher_is_the_network_before_the_cut_and_frozen(tmp_path):
    model, data = build()
    before = state(model.network)
    guide = Distillation()
    fit(model, data, [Pruning(Sparsity(0.9), tasks=["seg", "depth"], batches=1), guide], tmp_path, 2)
    assert same(state(guide.teacher), before) and not same(state(model.network), before)
    assert not any(p.requires_grad or p.grad is not None for p in guide.teacher.parameters())
    assert not any(m.training for m in guide.teacher.modules())
    assert guide.teacher.active == ["seg", "depth"]
    assert model.extras == [] and not model.network.backbone._forward_hooks
    assert not any("teacher" in k for k in model.state_dict())


class Keep(pl.Callback):
    """Writes a checkpoint after the first epoch, and what is watched at the end of every epoch."""

    def __init__(self, path=None) -> None:
        self.path, self.losses = path, []

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def test_a_resumed_training_has_the_dense_teacher_and_equals_running_through(tmp_path):
    def callbacks(path=None):
        return [Pruning(Sparsity(0.9), tasks=["normal"], batches=1), Distillation(), Keep(path)]

    through, data = build()
    dense = state(through.network)
    fit(through, data, callbacks(tmp_path / "half.ckpt"), tmp_path, 2)
    assert not any("teacher" in k for k in torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"])
    again, data = build()  # the dense model, as at the first start
    resumed = callbacks()
    fit(again, data, resumed, tmp_path, 2, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert same(state(resumed[1].teacher), dense)
    assert same(state(again.network), state(through.network))


def test_guidance_changes_the_training(tmp_path):
    losses, weights = [], []
    for guide in ([], [Distillation(weight=0.0, features=0.0)], [Distillation()]):
        model, data = build()
        keep = Keep()
        fit(model, data, [Pruning(Sparsity(0.9), tasks=["depth"], batches=1), *guide, keep], tmp_path, 1)
        losses.append(keep.losses[0])
        weights.append(state(model.network))
    assert losses[0] == losses[1] < losses[2]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(weight=-1.0), "weight=-1.0"),
        (lambda: Distillation(features=-0.1), "features=-0.1"),
        (lambda: Distillation(temperature=0.0), "temperature=0.0"),
        (lambda: SmallTowers(weight=-1.0), "weight=-1.0"),
        (lambda: SmallTowers(rate=0.0), "rate=0.0"),
        (lambda: Distillation().setup(None, BoringModel(), "fit"), "BoringModel has no 'extras'"),
        (lambda: SmallTowers().on_fit_start(None, BoringModel()), "BoringModel has no 'extras'"),
    ],
)
def test_bad_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Towers(pl.Callback):
    """The towers at the start and at the end of training; goes behind SmallTowers."""

    def __init__(self, towers: SmallTowers) -> None:
        self.towers = towers

    def on_train_start(self, trainer, pl_module):
        self.start = state(self.towers.towers)
        named = {id(p) for p in pl_module.parameters()}
        optimised = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        mine = {id(p) for p in self.towers.towers.parameters()}
        assert mine and not mine & (named | optimised)
        assert not any("tower" in k for k in pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        self.end = state(self.towers.towers)


def test_towers_train_beside_the_heads_and_are_thrown_away(tmp_path):
    model, data = build_with_scene()
    keys = list(model.state_dict())
    towers = SmallTowers()
    watch = Towers(towers)
    random = {}

    class Random(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            random["state"] = torch.get_rng_state()

    pruning = Pruning(Sparsity(0.8), tasks=["seg", "scene"], batches=1)
    fit(model, data, [pruning, towers, watch, Random()], tmp_path, 2)
    assert {k.split(".")[0] for k in watch.start} == {"seg", "scene"}
    assert watch.start["seg.weight"].shape[2:] == (1, 1) and watch.start["scene.weight"].dim() == 2
    assert not any(torch.equal(v, watch.end[k]) for k, v in watch.start.items())
    assert model.extras == [] and not model.network.backbone._forward_hooks and towers.towers is None
    assert list(model.state_dict()) == keys

    without, data = build_with_scene()  # the training's own random numbers are what they are without towers
    with_towers = random.pop("state")
    pruning = Pruning(Sparsity(0.8), tasks=["seg", "scene"], batches=1)
    fit(without, data, [pruning, Random()], tmp_path, 2)
    assert torch.equal(with_towers, random["state"])
    assert not same(state(without.network), state(model.network))  # they pull on the shared part


def test_the_towers_term_is_the_weighted_sum_of_their_losses():
    model, data = build_with_scene()
    model.eval()
    towers = SmallTowers(weight=0.3)
    towers.on_fit_start(None, model)
    batch = data.score_batches(1)[0]
    found = model(batch["image"])
    value = towers.loss(batch, found)
    deep = model.network.backbone(batch["image"])[-1]
    expected = 0.0
    for name, task in model.tasks.items():
        w, b = towers.towers[name].weight, towers.towers[name].bias
        if name == "scene":
            out = deep.mean((2, 3)) @ w.T + b
        else:
            small = torch.einsum("oi,nihw->nohw", w[:, :, 0, 0], deep) + b[:, None, None]
            out = F.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
        expected += 0.3 * task.weight * task.loss(out, batch)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert towers.on_fit_end(None, model) is None and not model.extras


def test_towers_of_no_weight_leave_the_training_as_it_was(tmp_path):
    ends = []
    for callbacks in ([], [SmallTowers(weight=0.0)]):
        model, data = build()
        fit(model, data, callbacks, tmp_path, 1)
        ends.append(state(model.network))
    assert same(*ends)


def test_a_resumed_training_with_towers_equals_running_through(tmp_path):
    def callbacks(path=None):
        towers = SmallTowers()
        return [Pruning(Sparsity(0.8), tasks=["normal"], batches=1), towers, Towers(towers), Keep(path)]

    through, data = build()
    first = callbacks(tmp_path / "half.ckpt")
    fit(through, data, first, tmp_path, 3)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any("tower" in k for k in saved["state_dict"])
    again, data = build()
    resumed = callbacks()
    fit(again, data, resumed, tmp_path, 3, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert not same(resumed[2].start, first[2].start)  # they went on, not anew
    assert same(resumed[2].end, first[2].end)
    assert same(state(again.network), state(through.network))


@pytest.mark.parametrize("scorer", [AtInitialisation(Sensitivity()), SynFlow(0.8, 3)])
def test_scorers_that_copy_the_network_work_in_the_middle_of_a_guided_training(tmp_path, scorer):
    model, data = build()
    callbacks = [Distillation(), SmallTowers(), Pruning(Sparsity(0.8), scorer=scorer, schedule=OneShot(1), batches=1)]
    fit(model, data, callbacks, tmp_path, 2)
    assert callbacks[2].mask and model.extras == []


def test_both_guides_work_with_maps_whose_channels_are_last(tmp_path):
    pl.seed_everything(0, verbose=False)
    data = Synthetic(("seg", "depth"), size=(32, 32), num=8, batch_size=8)
    config = NetworkConfig("swin_tiny_patch4_window7_224", head_width=8, img_size=(32, 32))
    model = MultiTaskModel(data.tasks, config)
    if not model.network.nhwc:
        pytest.skip("this version of timm gives channels second")
    towers = SmallTowers()
    watch = Towers(towers)
    fit(model, data, [Distillation(), towers, watch], tmp_path, 1)
    assert watch.start["seg.weight"].shape[1] == model.network.channels[-1]
    assert not torch.equal(watch.start["seg.weight"], watch.end["seg.weight"])
