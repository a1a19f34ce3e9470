"""The LightningModule: selection, logging, schedules, checkpoints."""

import functools
import itertools
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

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


def test_a_checkpoint_knows_its_network_but_no_tasks(data, tmp_path):
    """Loading names no config, reads no weight cache, and unpickles no object."""
    config = NetworkConfig("vit_tiny_patch16_224", head_width=8, img_size=(32, 32), weights="auto")
    model = MultiTaskModel(data.tasks, config, schedule="cosine", families=("corrected", "legacy"))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "m.ckpt")
    saved = torch.load(tmp_path / "m.ckpt", weights_only=True)["hyper_parameters"]
    assert set(saved) == {
        "network",
        "schedule",
        "warmup",
        "interval",
        "families",
        "channels_last",
        "width",
        "backbone_rate",
    }
    again = MultiTaskModel.load_from_checkpoint(tmp_path / "m.ckpt", tasks=data.tasks, weights_only=True)
    assert again.network.config == NetworkConfig("vit_tiny_patch16_224", head_width=8, img_size=(32, 32))
    assert again.schedule == "cosine"
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_both_metric_families_have_their_own_names(data, tmp_path):
    model = MultiTaskModel(data.tasks, SMALL, families=("corrected", "legacy"))
    run = trainer(tmp_path)
    run.validate(model, data, verbose=False)
    assert {"val/seg/miou", "val/seg/legacy/miou", "val/depth/legacy/rel"} <= set(run.callback_metrics)
    assert model.higher_is_better["seg/legacy/miou"] and not model.higher_is_better["depth/legacy/rel"]


def test_an_interrupted_training_has_the_same_dropout(data, tmp_path):
    """The state after two epochs is that of one epoch, a checkpoint, and another; the loader is not shuffled."""
    loader = torch.utils.data.DataLoader(data.score_batches(2, 8), batch_size=None)
    config = NetworkConfig("test_resnet", head_width=8, dropout=0.5)

    def fit(epochs, **options):
        pl.seed_everything(3, verbose=False)
        model = MultiTaskModel(data.tasks, config, schedule="constant", warmup=0.0)
        run = trainer(tmp_path, max_epochs=epochs, limit_val_batches=0)
        run.fit(model, loader, **options)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.network.state_dict()

    fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    through = fit(2)
    assert all(torch.equal(v, through[k]) for k, v in resumed.items())


def test_a_scheduler_of_ones_own_is_stepped_at_its_interval(data, tmp_path):
    def rates(interval):
        model = MultiTaskModel(
            data.tasks,
            SMALL,
            optimizer=lambda p: torch.optim.Adam(p, lr=1.0e-3),
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
            interval=interval,
        )
        run = trainer(tmp_path, limit_val_batches=0)
        run.fit(model, data)
        return run.global_step, run.optimizers[0].param_groups[0]["lr"]

    steps, rate = rates("step")
    assert steps == 2 and rate == pytest.approx(1e-3 * 0.5**2)
    assert rates("epoch")[1] == pytest.approx(1e-3 * 0.5)


def test_a_slow_backbone_moves_by_its_share_and_heads_as_ever(data, tmp_path):
    def moved(share):
        torch.manual_seed(0)
        optimizer = functools.partial(torch.optim.SGD, lr=1e-2)
        model = MultiTaskModel(
            data.tasks, SMALL, optimizer=optimizer, schedule="constant", warmup=0.0, backbone_rate=share
        )
        before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
        torch.manual_seed(1)
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, data)
        return {n: p.detach() - before[n] for n, p in model.network.named_parameters()}

    whole, quarter = moved(1.0), moved(0.25)
    assert any(n.startswith("backbone.") and v.any() for n, v in whole.items())
    for name, step in whole.items():
        factor = 0.25 if name.startswith("backbone.") else 1.0
        torch.testing.assert_close(quarter[name], factor * step, rtol=1e-3, atol=1e-7)


def test_a_schedule_keeps_the_backbones_share(data, tmp_path):
    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(tuple(group["lr"] for group in trainer.optimizers[0].param_groups))

    rates: list[tuple[float, float]] = []
    model = MultiTaskModel(data.tasks, SMALL, schedule="cosine", backbone_rate=0.1)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[Seen()]).fit(model, data)
    assert len({heads for heads, _ in rates}) == 4  # it changes at every step
    assert all(0 < backbone == pytest.approx(0.1 * heads) for heads, backbone in rates)


def test_the_papers_config_has_its_step_schedule(data, tmp_path):
    """cut-method 4.3, NYU-v2: Adam 1e-4 with decay 1e-4, times 0.7 every 4000 iterations."""
    path = Path(__file__).parent.parent / "configs/model/deeplab_resnet34.yaml"
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(MultiTaskModel, "model", subclass_mode=True)
    content = yaml.safe_load(path.read_text())
    content["model"]["init_args"]["network"]["head_width"] = 8
    content["model"]["init_args"]["tasks"] = []
    chosen = parser.parse_object(content).model.init_args
    assert (chosen.network.backbone, chosen.network.output_stride, chosen.interval) == ("resnet34", 8, "step")
    assert chosen.optimizer.init_args.lr == chosen.optimizer.init_args.weight_decay == 1e-4
    assert chosen.scheduler.class_path.endswith("StepLR")
    assert (chosen.scheduler.init_args.step_size, chosen.scheduler.init_args.gamma) == (4000, 0.7)


def test_a_schedule_needs_an_end(model, data, tmp_path):
    with pytest.raises(ValueError, match="'onecycle' needs an end"):
        trainer(tmp_path, max_epochs=-1).fit(model, data)


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
        (lambda d: MultiTaskModel(d.tasks, SMALL, schedule="linear"), "schedule 'linear'; allowed: 'constant'"),
        (lambda d: MultiTaskModel(d.tasks, SMALL, interval="batch"), "interval 'batch'; allowed: 'step', 'epoch'"),
        (lambda d: MultiTaskModel(d.tasks, SMALL, backbone_rate=0.0), "backbone_rate 0.0; allowed: above 0"),
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


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_channels_last_gives_the_same_outputs_and_leaves_the_weights(data, backbone):
    config = NetworkConfig(backbone, head_width=8, img_size=(32, 32) if "vit" in backbone else None, resize="patch")
    models = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        models.append(MultiTaskModel(data.tasks, config, channels_last=channels_last).eval())
    plain, fast = models
    image, seen = data.score_batches(1)[0]["image"], []
    fast.network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for (task, a), b in zip(plain(image).items(), fast(image).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=task)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert all(p.is_contiguous() for p in fast.network.parameters())


def test_channels_last_training_is_the_same_but_for_rounding(data, tmp_path):
    ends = []
    for channels_last in (False, True):
        pl.seed_everything(0, verbose=False)
        model = MultiTaskModel(
            data.tasks, SMALL, lambda p: torch.optim.SGD(p, lr=0.01), "constant", 0.0, channels_last=channels_last
        )
        trainer(tmp_path, limit_val_batches=0).fit(model, data)
        assert all(p.is_contiguous() for p in model.network.parameters())
        assert model.hparams["channels_last"] == channels_last
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluating_outside_the_trainer_gives_what_it_would_log(model, tmp_path, split):
    data = Synthetic(("seg", "normal", "depth", "scene"), size=(32, 32), num=52, batch_size=8)  # 13 = 8 + 5
    model.select(["seg", "depth", "scene"])
    run = trainer(tmp_path)
    (expected,) = (run.validate if split == "val" else run.test)(model, data, verbose=False)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    assert [len(b["image"]) for b in loader] == [8, 5]
    model.train()
    for _ in range(2):  # nothing of the first time is left in the second
        found = model.evaluate(loader, split)
        assert found == pytest.approx(expected, rel=1e-5)
    assert {f"{split}/seg/miou", f"{split}/scene/loss", f"{split}/loss"} <= set(found)
    assert not any("normal" in k for k in found)
    assert model.training and not any(p.grad is not None for p in model.parameters())


def test_evaluating_in_the_middle_of_training_does_not_change_it(data, tmp_path):
    class Evaluate(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.evaluate(data.score_batches(1), "test")

    ends = []
    for callbacks in ([], [Evaluate()]):
        pl.seed_everything(0, verbose=False)
        model = MultiTaskModel(data.tasks, NetworkConfig("test_resnet", head_width=8, dropout=0.3))
        trainer(tmp_path, callbacks=callbacks).fit(model, data)
        ends.append(model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_extras_and_factors_are_part_of_the_training_loss_only(model, data):
    model.eval()
    logged = {}
    model.log = lambda name, value, **k: logged.update({name: float(value)})
    model.log_dict = lambda values, **k: logged.update({n: float(v.detach()) for n, v in values.items()})
    batch = data.score_batches(1)[0]
    outputs = model(batch["image"])
    losses = {t.name: t.loss(outputs[t.name], batch).detach() for t in data.tasks}
    plain = model.evaluate([batch], "val")
    model.factors = {"seg": 3.0, "scene": 0.0}  # those without an entry count with 1
    seen = []

    def extra(given, found):
        seen.append((given, set(found)))
        return found["depth"].mean() * 0 + 10.0

    model.extras += [extra, lambda given, found: found["seg"].square().mean()]
    total = model.training_step(batch, 0)
    weights = {t.name: t.weight for t in data.tasks}
    factors = {"seg": 3.0, "normal": 1.0, "depth": 1.0, "scene": 0.0}
    expected = sum(factors[t] * weights[t] * losses[t] for t in losses) + 10.0 + outputs["seg"].square().mean()
    torch.testing.assert_close(total.detach(), expected.detach())
    assert total.requires_grad and seen[0][0] is batch and seen[0][1] == set(losses)
    assert logged["train/loss"] == pytest.approx(float(expected.detach()))
    # The tasks' own losses are logged, and kept for callbacks, without factors.
    assert {t: logged[f"train/{t}/loss"] for t in losses} == pytest.approx({t: float(v) for t, v in losses.items()})
    assert {t: float(v) for t, v in model.latest.items()} == pytest.approx({t: float(v) for t, v in losses.items()})
    assert not any(v.requires_grad for v in model.latest.values())
    assert model.evaluate([batch], "val") == plain
    model.validation_step(batch, 0)
    assert logged["val/loss"] == pytest.approx(plain["val/loss"]) and len(seen) == 1
