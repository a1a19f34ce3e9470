"""The LightningModule: selection, logging, schedules, checkpoints."""

import itertools

import lightning.pytorch as pl
import pytest
import torch

from cut.data.synthetic import Synthetic
from cut.model import MultiTaskModel, factor
from cut.network import NetworkConfig

SMALL = NetworkConfig(backbone="test_resnet", head_width=8)


def trainer(tmp_path, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


@pytest.fixture
def data():
    return Synthetic(("seg", "normal", "depth", "scene"), size=(32, 32), num=16, batch_size=8)


@pytest.fixture
def model(data):
    torch.manual_seed(0)
    return MultiTaskModel(data.tasks, SMALL)


def test_fit_and_test_log_losses_and_metrics_of_every_task(model, data, tmp_path):
    run = trainer(tmp_path)
    run.fit(model, data)
    logged = set(run.callback_metrics)
    assert {
        "train/loss",
        "train/seg/loss",
        "val/normal/mean",
        "val/depth/rel",
        "val/scene/accuracy",
    } <= logged
    run.test(model, data, verbose=False)
    assert {"test/seg/miou", "test/normal/within_30", "test/depth/delta1"} <= set(run.callback_metrics)
    assert all(torch.isfinite(v) for v in run.callback_metrics.values())


def test_deselected_heads_are_frozen_not_run_and_not_in_the_loss(model, data, tmp_path):
    model.select(["depth"])
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    run = trainer(tmp_path)
    run.fit(model, data)
    assert not any("seg" in k for k in run.callback_metrics)
    for name, p in model.network.named_parameters():
        if name.startswith("heads.") and not name.startswith("heads.depth"):
            assert torch.equal(p, before[name]) and not p.requires_grad
    assert not torch.equal(model.network.heads["depth"].out.weight, before["heads.depth.out.weight"])


def test_the_loss_is_the_weighted_sum(data):
    import dataclasses

    tasks = [dataclasses.replace(t, weight=w) for t, w in zip(data.tasks, (1.0, 20.0, 3.0, 0.5), strict=True)]
    torch.manual_seed(0)
    model = MultiTaskModel(tasks, SMALL).eval()
    model.log = model.log_dict = lambda *a, **k: None
    batch = data.score_batches(1)[0]
    expected = sum(t.weight * t.loss(model(batch["image"])[t.name], batch) for t in tasks)
    torch.testing.assert_close(model.training_step(batch, 0), expected)


def test_metrics_at_label_resolution(model, data, tmp_path):
    """Labels of twice the picture's size are compared at their own size."""
    batch = data.score_batches(1)[0]
    big = dict(batch, seg=batch["seg"].repeat_interleave(2, -1).repeat_interleave(2, -2))
    out = model(batch["image"])["seg"]
    up = torch.nn.functional.interpolate(out, (64, 64), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(up, big["seg"])
    torch.testing.assert_close(model.tasks["seg"].loss(out, big), expected)


def test_a_checkpoint_loads_weights_only(model, data, tmp_path):
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "m.ckpt")
    state = torch.load(tmp_path / "m.ckpt", weights_only=True)
    again = MultiTaskModel(data.tasks, SMALL)
    again.load_state_dict(state["state_dict"])
    image = data.score_batches(1)[0]["image"]
    for a, b in zip(model.eval()(image).values(), again.eval()(image).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_schedules_rise_and_fall(schedule):
    values = [factor(schedule, i / 100, 0.1) for i in range(101)]
    assert max(values) == pytest.approx(1.0) and values[0] < 0.1
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values[:11]))
    assert values[-1] == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-9))


def test_bfloat16_through_the_trainer(model, data, tmp_path):
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(model, data)
    assert torch.isfinite(run.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: MultiTaskModel(d.tasks, SMALL, warmup=1.0), "warmup 1.0"),
        (lambda d: MultiTaskModel(d.tasks, SMALL, families=("best",)), "metric families"),
        (lambda d: MultiTaskModel([d.tasks[0], d.tasks[0]], SMALL), "same name"),
        (lambda d: MultiTaskModel(d.tasks, SMALL).select(["flow"]), "unknown task 'flow'"),
        (
            lambda d: MultiTaskModel(d.tasks, SMALL).training_step({"image": torch.zeros(2, 3, 64, 64)}, 0),
            "no label 'seg'",
        ),
    ],
)
def test_bad_choices_are_refused(data, make, message):
    with pytest.raises(ValueError, match=message):
        make(data)
