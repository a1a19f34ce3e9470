"""Losses against plain NumPy, nothing valid, labels out of range."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cut import tasks

RNG = np.random.default_rng(1)
B, H, W = 3, 5, 7

SEG = tasks.segmentation(["wall", "floor", "bed"])
NORMAL = tasks.normals()
DEPTH = tasks.depth()
EDGE = tasks.regression_map("edge")
SCENE = tasks.classification(["kitchen", "office"])
ALL = (SEG, NORMAL, DEPTH, EDGE, SCENE)


def unknown_batch() -> dict[str, torch.Tensor]:
    return {
        "seg": torch.full((B, H, W), 255),
        "normal": torch.zeros(B, 3, H, W),
        "depth": torch.zeros(B, 1, H, W),
        "edge": torch.full((B, 1, H, W), torch.nan),
        "scene": torch.full((B,), 255),
    }


def output_of(task: tasks.Task) -> torch.Tensor:
    shape = (B, task.channels, H, W) if task.dense else (B, task.channels)
    return torch.from_numpy(RNG.normal(size=shape).astype(np.float32)).requires_grad_()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_segmentation_loss() -> None:
    output, target = output_of(SEG), RNG.integers(0, 3, (B, H, W))
    target[0, :3] = 255
    logs = log_softmax(output.detach().numpy().astype(np.float64))
    picked = [
        -logs[b, target[b, y, x], y, x] for b in range(B) for y in range(H) for x in range(W) if target[b, y, x] != 255
    ]
    loss = SEG.loss(output, {"seg": torch.from_numpy(target)})
    assert loss.item() == pytest.approx(np.mean(picked), rel=1e-5)


def test_class_weights_are_torch_s() -> None:
    weights = (0.2, 3.0, 1.0)
    task = tasks.segmentation("abc", class_weights=weights)
    output, target = output_of(task), torch.from_numpy(RNG.integers(0, 3, (B, H, W)))
    target[1] = 255
    expected = F.cross_entropy(output, target, torch.tensor(weights), ignore_index=255)
    assert task.loss(output, {"seg": target}).item() == pytest.approx(expected.item(), rel=1e-5)


def test_normal_loss() -> None:
    output = output_of(NORMAL)
    target = RNG.normal(size=(B, 3, H, W))
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    target[:, :, 0] = 0
    u, v = output.detach().numpy()[:, :, 1:], target[:, :, 1:]
    expected = 1 - ((u * v).sum(1) / np.linalg.norm(u, axis=1)).mean()
    loss = NORMAL.loss(output, {"normal": torch.from_numpy(target).float()})
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_silenced_normal_head_gets_a_bounded_gradient() -> None:
    output = torch.zeros(B, 3, H, W, requires_grad=True)
    target = torch.zeros(B, 3, H, W)
    target[:, 2] = 1
    loss = NORMAL.loss(output, {"normal": target})
    loss.backward()
    assert loss.item() == 1
    assert 0 < output.grad.abs().sum() <= 1001


def test_depth_loss() -> None:
    output, target = output_of(DEPTH), RNG.uniform(0, 5, (B, 1, H, W)).astype(np.float32)
    target[target < 2] = 0
    expected = np.abs(output.detach().numpy() - target)[target > 0].mean()
    assert DEPTH.loss(output, {"depth": torch.from_numpy(target)}).item() == pytest.approx(expected, rel=1e-5)


def test_map_loss_and_its_gradient_ignore_nan() -> None:
    output, target = output_of(EDGE), RNG.random((B, 1, H, W)).astype(np.float32)
    target[:, :, ::2] = np.nan
    loss = EDGE.loss(output, {"edge": torch.from_numpy(target)})
    loss.backward()
    assert loss.item() == pytest.approx(np.nanmean(np.abs(output.detach().numpy() - target)), rel=1e-5)
    assert output.grad.isfinite().all()
    assert (output.grad[torch.from_numpy(target).isnan()] == 0).all()


def test_scene_loss() -> None:
    output = output_of(SCENE)
    expected = F.cross_entropy(output[:2], torch.tensor([1, 0])).item()
    assert SCENE.loss(output, {"scene": torch.tensor([1, 0, 255])}).item() == pytest.approx(expected)


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_nothing_valid_is_a_connected_zero(task: tasks.Task) -> None:
    output = output_of(task)
    loss = task.loss(output, unknown_batch())
    loss.backward()
    assert loss.item() == 0
    assert (output.grad == 0).all()


def test_low_resolution_output_meets_the_label_s_resolution() -> None:
    small = torch.randn(B, 3, 3, 4)
    batch = {"seg": torch.randint(0, 3, (B, 9, 12))}
    large = F.interpolate(small, (9, 12), mode="bilinear", align_corners=False)
    assert SEG.loss(small, batch).item() == pytest.approx(SEG.loss(large, batch).item(), rel=1e-6)


def test_half_precision_outputs_are_judged_in_single() -> None:
    for task in ALL:
        assert task.loss(output_of(task).bfloat16(), unknown_batch()).dtype == torch.float32


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        (SEG, 3, r"label 3 is out of range: 0 to 2, unknown = 255 \(task 'seg'\)"),
        (SEG, -1, r"label -1 .* 0 to 2"),
        (NORMAL, 200.0, r"label 200 .* unknown = 0 0 0 \(task 'normal'\)"),
        (DEPTH, -1.0, r"label -1 .* unknown = 0 \(task 'depth'\)"),
        (DEPTH, float("inf"), r"label inf"),
        (DEPTH, float("nan"), r"label nan"),
        (EDGE, 255.0, r"label 255 .* 0 to 1, unknown = NaN \(task 'edge'\)"),
        (EDGE, float("inf"), r"label inf"),
        (SCENE, 2, r"label 2 .* 0 to 1"),
    ],
)
def test_labels_out_of_range_are_named(task: tasks.Task, value: float, message: str) -> None:
    batch = unknown_batch()
    batch[task.name].view(-1)[4 if task.dense else 1] = value
    with pytest.raises(ValueError, match=message):
        task.loss(output_of(task), batch)


def test_a_map_can_have_another_range() -> None:
    task = tasks.regression_map("keypoint", low=-1)
    target = torch.full((B, 1, H, W), -1.0)
    assert task.loss(torch.zeros_like(target), {"keypoint": target}).item() == 1


def test_missing_label_is_named() -> None:
    with pytest.raises(ValueError, match=r"no label 'seg'; its entries are \['depth'\]"):
        SEG.loss(output_of(SEG), {"depth": torch.zeros(1)})


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="metric family 'old'; allowed: 'corrected', 'legacy'"):
        SEG.metrics("old")


def test_metrics_are_fresh() -> None:
    first, second = DEPTH.metrics(), DEPTH.metrics()
    first.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert second["abs"].count == 0


def test_constructors_refuse() -> None:
    with pytest.raises(ValueError, match="0 classes"):
        tasks.classification([])
    with pytest.raises(ValueError, match="2 class weights of task 'seg'; allowed: 3"):
        tasks.segmentation("abc", class_weights=(1, 2))


def test_families_have_the_same_metrics() -> None:
    for task in ALL:
        assert set(task.metrics()) == set(task.metrics("legacy"))


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_tasks_survive_the_way_to_another_process(task: tasks.Task) -> None:
    again = pickle.loads(pickle.dumps(task))
    output, batch = output_of(task), unknown_batch()
    batch[task.name].view(-1)[:] = 1
    assert again.loss(output, batch) == task.loss(output, batch) != 0
    assert (again.name, again.classes, again.weight) == (task.name, task.classes, task.weight)
    assert set(again.metrics("legacy")) == set(task.metrics("legacy"))
