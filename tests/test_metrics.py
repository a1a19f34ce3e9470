"""Every metric against plain NumPy over the whole set, on inputs where the two families differ."""

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from cut import tasks
from cut.metrics import add_exactly, delta_m

RNG = np.random.default_rng(0)
NUM, H, W = 5, 6, 8
BATCHES = (2, 2, 1)


def over_batches(metrics: MetricCollection, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The metrics of a whole set that comes in batches of unequal size."""
    start = 0
    for size in BATCHES:
        part = slice(start, start + size)
        metrics.update(torch.from_numpy(output[part]), torch.from_numpy(target[part]))
        start += size
    return {key: float(value) for key, value in metrics.compute().items()}


def uneven_valid() -> np.ndarray:
    """Valid pixels, far fewer in some pictures than in others: means over pictures and over pixels differ."""
    return RNG.random((NUM, H, W)) < np.array([0.9, 0.1, 0.5, 0.95, 0.2])[:, None, None]


def seg_set() -> tuple[np.ndarray, np.ndarray]:
    """Five classes: 3 is never right (present), 4 is absent from the labels but predicted."""
    target = RNG.integers(0, 4, (NUM, H, W))
    logits = RNG.normal(size=(NUM, 5, H, W)).astype(np.float32)
    hit = RNG.random((NUM, H, W)) < np.linspace(0.1, 0.9, NUM)[:, None, None]
    for k in range(4):
        logits[:, k] += 5 * ((target == k) & hit)
    logits[:, 3] -= 100 * (target == 3)
    target[~uneven_valid()] = 255
    return logits, target


def test_segmentation_counts_the_whole_set() -> None:
    logits, target = seg_set()
    predicted, valid = logits.argmax(1), target != 255
    p, t = predicted[valid], target[valid]
    ious = [((p == k) & (t == k)).sum() / ((p == k) | (t == k)).sum() for k in range(4)]
    assert ious[3] == 0 and (p == 4).any()
    found = over_batches(tasks.segmentation("abcde").metrics(), logits, target)
    assert found == pytest.approx({"miou": np.mean(ious), "pixel_acc": (p == t).mean()})


def test_legacy_segmentation_forgets_lost_classes_and_averages_pictures() -> None:
    logits, target = seg_set()
    predicted, valid = logits.argmax(1), target != 255
    p, t = predicted[valid], target[valid]
    ious = [((p == k) & (t == k)).sum() / ((p == k) | (t == k)).sum() for k in range(3)]
    per_picture = [(predicted[i] == target[i])[valid[i]].mean() for i in range(NUM)]
    found = over_batches(tasks.segmentation("abcde").metrics("legacy"), logits, target)
    assert found == pytest.approx({"miou": np.mean(ious), "pixel_acc": np.mean(per_picture)})
    assert np.mean(per_picture) != pytest.approx((p == t).mean(), abs=0.01)


def test_legacy_accuracy_can_count_void_as_wrong() -> None:
    logits, target = seg_set()
    family = tasks.segmentation("abcde", void_is_wrong=True).metrics("legacy")
    found = over_batches(family, logits, target)["pixel_acc"]
    assert found == pytest.approx((logits.argmax(1) == target).mean())


def test_losing_a_class_lowers_miou_and_raises_the_legacy_one() -> None:
    target = torch.tensor([0] * 6 + [1] * 2 + [2] * 2).view(1, 1, 10)
    both, lost = target.clone(), target.clone()
    both[0, 0, 7] = 0  # class 1 half right
    lost[0, 0, 6:8] = 2  # class 1 never
    values = {}
    for name, predicted in (("both", both), ("lost", lost)):
        logits = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
        for family in ("corrected", "legacy"):
            metrics = tasks.segmentation("abc").metrics(family)
            metrics.update(logits, target)
            values[name, family] = float(metrics.compute()["miou"])
    assert values["lost", "corrected"] < values["both", "corrected"]
    assert values["lost", "legacy"] == pytest.approx(np.mean([1, 0.5]))
    assert values["lost", "corrected"] == pytest.approx(np.mean([1, 0, 0.5]))


def test_wrong_label_is_named() -> None:
    metrics = tasks.segmentation("abc").metrics()
    with pytest.raises(ValueError, match=r"label 7 is out of range: classes are 0 to 2, 255 = void"):
        metrics.update(torch.zeros(1, 3, 1, 2), torch.tensor([[[1, 7]]]))


def normal_set() -> tuple[np.ndarray, np.ndarray]:
    target = RNG.normal(size=(NUM, 3, H, W))
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    output = target + RNG.normal(size=target.shape) * np.linspace(0.05, 1, NUM)[:, None, None, None]
    target *= uneven_valid()[:, None]
    return (output * 3).astype(np.float32), target.astype(np.float32)


def degrees(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Angles between vectors [..., 3] in float64."""
    cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@pytest.mark.parametrize("family", ["corrected", "legacy"])
def test_normals_compare_all_pixels_of_the_set(family: str) -> None:
    output, target = normal_set()
    valid = (target != 0).any(1)
    u, v = (np.moveaxis(x, 1, -1)[valid].astype(np.float64) for x in (output, target))
    if family == "legacy":  # colours 0 to 255, which nobody decoded
        u = (u / np.linalg.norm(u, axis=-1, keepdims=True) + 1) / 2 * 255
        v = (v + 1) / 2 * 255
    angles = degrees(u, v)
    found = over_batches(tasks.normals().metrics(family), output, target)
    assert found.pop("mean") == pytest.approx(angles.mean(), abs=1e-3)
    assert found.pop("median") == pytest.approx(np.median(angles), abs=0.0101)
    limits = {"within_11": 11.25, "within_22": 22.5, "within_30": 30.0}
    assert found == pytest.approx({key: (angles < limit).mean() for key, limit in limits.items()})


def test_raw_colours_shrink_angles() -> None:
    output, target = normal_set()
    found = [over_batches(tasks.normals().metrics(f), output, target)["mean"] for f in ("corrected", "legacy")]
    assert found[1] < 0.7 * found[0]


def test_zero_normals_are_a_right_angle_off_and_broken_ones_180() -> None:
    target = torch.zeros(1, 3, 1, 2)
    target[:, 2] = 1
    for value, expected in ((0.0, 90.0), (float("nan"), 180.0), (float("inf"), 180.0)):
        metrics = tasks.normals().metrics()
        metrics.update(torch.full((1, 3, 1, 2), value), target)
        assert float(metrics.compute()["mean"]) == pytest.approx(expected)
        assert float(metrics.compute()["within_30"]) == 0


def test_equal_normals_are_exactly_equal() -> None:
    _, target = normal_set()
    found = over_batches(tasks.normals().metrics(), target * 7, target)
    assert found["mean"] < 1e-4
    assert found["within_11"] == 1


def depth_set() -> tuple[np.ndarray, np.ndarray]:
    target = RNG.uniform(0.5, 6, (NUM, 1, H, W)) * uneven_valid()[:, None]
    output = RNG.uniform(0.3, 7, target.shape)
    output[:, :, ::3] = target[:, :, ::3] * RNG.uniform(0.9, 1.1, target[:, :, ::3].shape)
    output[:, :, 1, :3] = -1.0
    return output.astype(np.float32), target.astype(np.float32)


def test_depth_counts_valid_pixels_of_the_set() -> None:
    output, target = depth_set()
    valid = target > 0
    p, t = output[valid].astype(np.float64), target[valid].astype(np.float64)
    ratio = np.where(p > 0, np.maximum(p / t, t / p), np.inf)
    expected = {"abs": np.abs(p - t).mean(), "rel": (np.abs(p - t) / t).mean()}
    expected |= {f"delta{k}": (ratio < 1.25**k).mean() for k in (1, 2, 3)}
    assert over_batches(tasks.depth().metrics(), output, target) == pytest.approx(expected, rel=1e-5)


def test_legacy_depth_averages_pictures_and_passes_negative_depths() -> None:
    output, target = depth_set()
    valid = target > 0
    error = np.abs(output - target)
    pictures = [i for i in range(NUM) if valid[i].any()]
    expected = {"abs": np.mean([error[i][valid[i]].mean() for i in pictures])}
    expected["rel"] = np.mean([(error[i][valid[i]] / target[i][valid[i]]).mean() for i in pictures])
    p, t = output[valid], target[valid]
    ratio = np.maximum(p / t, t / p)
    expected |= {f"delta{k}": (ratio <= 1.25**k).mean() for k in (1, 2, 3)}
    found = over_batches(tasks.depth().metrics("legacy"), output, target)
    assert found == pytest.approx(expected, rel=1e-5)
    corrected = over_batches(tasks.depth().metrics(), output, target)
    assert all(abs(found[key] - corrected[key]) > 1e-3 for key in found)


def test_maps_leave_out_unknown_pixels() -> None:
    target = RNG.random((NUM, 1, H, W)).astype(np.float32)
    output = RNG.random((NUM, 1, H, W)).astype(np.float32)
    target[~uneven_valid()[:, None]] = np.nan
    error = np.abs(output - target)
    found = over_batches(tasks.regression_map("edge").metrics(), output, target)
    assert found == pytest.approx({"l1": np.nanmean(error)})
    old = over_batches(tasks.regression_map("edge").metrics("legacy"), output, target)
    assert old == pytest.approx({"l1": np.mean([np.nanmean(e) for e in error if np.isfinite(e).any()])})
    assert abs(old["l1"] - found["l1"]) > 1e-3


def test_accuracy_leaves_out_unknown_pictures() -> None:
    metrics = tasks.classification("abc").metrics()
    metrics.update(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 0, 255]))
    assert float(metrics.compute()["accuracy"]) == pytest.approx(2 / 3)


ALL = {
    "seg": (tasks.segmentation("abcde"), seg_set),
    "normal": (tasks.normals(), normal_set),
    "depth": (tasks.depth(), depth_set),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", ["corrected", "legacy"])
def test_two_processes_equal_one(name: str, family: str) -> None:
    task, make = ALL[name]
    output, target = (torch.from_numpy(x) for x in make())
    parts = [task.metrics(family) for _ in range(2)]
    whole = task.metrics(family)
    for i in range(NUM):  # one picture at a time: also independent of the batch size
        parts[i % 2].update(output[i : i + 1], target[i : i + 1])
    whole.update(output, target)
    for key, metric in parts[0].items():
        for state, reduction in metric._reductions.items():
            both = [getattr(part[key], state) for part in parts]
            assert reduction is not None
            setattr(metric, state, reduction(torch.stack(both)))
        assert float(metric.compute()) == pytest.approx(float(whole[key].compute()), rel=1e-6)


@pytest.mark.parametrize("family", ["corrected", "legacy"])
def test_no_valid_label_gives_nan(family: str) -> None:
    cases = [
        (tasks.segmentation("ab"), torch.zeros(2, 2, 3, 3), torch.full((2, 3, 3), 255)),
        (tasks.normals(), torch.ones(2, 3, 3, 3), torch.zeros(2, 3, 3, 3)),
        (tasks.depth(), torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)),
        (tasks.regression_map("edge"), torch.ones(2, 1, 3, 3), torch.full((2, 1, 3, 3), torch.nan)),
        (tasks.classification("ab"), torch.zeros(2, 2), torch.full((2,), 255)),
    ]
    for task, output, target in cases:
        metrics = task.metrics(family)
        metrics.update(output, target)
        assert all(value.isnan() for value in metrics.compute().values()), task.name


def test_directions() -> None:
    up = {
        "miou",
        "pixel_acc",
        "within_11",
        "within_22",
        "within_30",
        "delta1",
        "delta2",
        "delta3",
        "accuracy",
    }
    down = {"mean", "median", "abs", "rel", "l1"}
    found = set()
    for task in (
        *(task for task, _ in ALL.values()),
        tasks.regression_map("edge"),
        tasks.classification("ab"),
    ):
        for family in ("corrected", "legacy"):
            for key, metric in task.metrics(family).items():
                assert metric.higher_is_better is (key in up)
                found.add(key)
    assert found == up | down


def test_sums_stay_exact_over_many_batches() -> None:
    total, rest = torch.tensor(2.0**26), torch.tensor(0.0)
    for _ in range(3000):
        total, rest = add_exactly(total, rest, torch.tensor(0.1))
    assert total.double() + rest.double() == pytest.approx(2.0**26 + 300, abs=0.05)
    assert total == 2.0**26  # float32 alone would have lost it all


UP = {"seg/miou": True, "seg/pixel_acc": True, "depth/abs": False}


def test_delta_m_averages_tasks_not_metrics() -> None:
    reference = {"seg/miou": 0.4, "seg/pixel_acc": 0.8, "depth/abs": 0.5}
    metrics = {"seg/miou": 0.3, "seg/pixel_acc": 0.88, "depth/abs": 0.6}
    assert delta_m(metrics, reference, UP) == pytest.approx(((-25 + 10) / 2 + -20) / 2)
    assert delta_m(reference, reference, UP) == 0


def test_delta_m_is_clipped_per_metric() -> None:
    reference = {"seg/miou": 0.1, "depth/abs": 0.1}
    metrics = {"seg/miou": 0.9, "depth/abs": 0.5}
    assert delta_m(metrics, reference, UP) == pytest.approx((800 - 400) / 2)
    assert delta_m(metrics, reference, UP, clip=100) == 0
    assert np.isnan(delta_m({**metrics, "seg/miou": np.nan}, reference, UP, clip=100))


def test_delta_m_of_a_negative_reference_keeps_its_sign() -> None:
    assert delta_m({"a/x": -1.0}, {"a/x": -2.0}, {"a/x": True}) == 50


@pytest.mark.parametrize(
    ("metrics", "reference", "clip", "message"),
    [
        ({}, {}, None, "same metrics"),
        ({"seg/miou": 1.0}, {"seg/miou": 1.0, "depth/abs": 1.0}, None, "depth/abs"),
        ({"seg/miou": 1.0}, {"seg/miou": 0.0}, None, "'seg/miou' is 0"),
        ({"seg/x": 1.0}, {"seg/x": 1.0}, None, "no direction for metric 'seg/x'"),
        ({"seg/miou": 1.0}, {"seg/miou": 1.0}, -1.0, "clip -1.0"),
    ],
)
def test_delta_m_refuses(metrics: dict, reference: dict, clip: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_m(metrics, reference, UP, clip)


def test_legacy_miou_is_zero_if_no_class_is_ever_right_and_nothing_without_labels():
    logits = torch.tensor([[[[5.0, 5.0]], [[0.0, 0.0]]]])  # always class 0
    wrong, void = torch.tensor([[[1, 1]]]), torch.tensor([[[255, 255]]])
    for target, expected in ((wrong, 0.0), (void, float("nan"))):
        metric = tasks.segmentation(["a", "b"]).metrics("legacy")["miou"]
        metric.update(logits, target)
        assert float(metric.compute()) == pytest.approx(expected, nan_ok=True)
