"""The Pruning callback: exact, lasting, resumable, the same on all processes."""

import os
import socket

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import multiprocessing

from cut.budget import Sparsity
from cut.data.synthetic import Synthetic
from cut.decomposition import prunable
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from cut.pruning import Pruning
from cut.schedules import Gradual, Iterative, OneShot
from cut.scores import Magnitude, Sensitivity

TASKS = ("seg", "normal", "depth")


class KeepMasks(pl.Callback):
    """Remembers the mask after every epoch."""

    def __init__(self) -> None:
        self.masks = []

    def on_train_epoch_end(self, trainer, pl_module):
        pruning = next(c for c in trainer.callbacks if isinstance(c, Pruning))
        self.masks.append({n: m.clone() for n, m in pruning.mask.items()})


def build(dropout: float = 0.1) -> tuple[MultiTaskModel, Synthetic]:
    pl.seed_everything(7, verbose=False)
    data = Synthetic(TASKS, size=(32, 32), num=16, batch_size=8, seed=3)
    model = MultiTaskModel(
        data.tasks,
        NetworkConfig(backbone="test_resnet", head_width=8, dropout=dropout),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        schedule="constant",
        warmup=0.0,
    )
    return model, data


def fit(model, data, callbacks, tmp_path, epochs: int, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options.pop("trainer", {}),
    )
    trainer.fit(model, data, **options)
    return trainer


def weights_of_kept(model, kept):
    return {n: w for n, w in prunable(model.network).items() if not n.startswith("heads.") or n.split(".")[1] in kept}


def zeros(mask, names) -> int:
    return sum(int((~mask[n]).sum()) for n in names if n in mask)


@pytest.mark.parametrize("scorer", [Sensitivity(), Magnitude()])
def test_cut_weights_stay_dead_under_momentum_and_decay(scorer, tmp_path):
    model, data = build()
    pruning = Pruning(Sparsity(0.9), tasks=["seg", "depth"], scorer=scorer, batches=2)
    fit(model, data, [pruning], tmp_path, 2)
    kept = weights_of_kept(model, ["seg", "depth"])
    total = sum(w.numel() for w in kept.values())
    assert zeros(pruning.mask, kept) == round(0.9 * total)
    for name, p in model.network.named_parameters():
        if name in pruning.mask:
            assert not p[~pruning.mask[name]].any(), name
    assert model.active == ["seg", "depth"]


@pytest.mark.parametrize(
    "schedule",
    [Iterative(rounds=3, final_sparsity=0.9), Gradual(0, 3), OneShot(1)],
    ids=lambda s: type(s).__name__,
)
def test_masks_only_shrink_and_end_at_the_budget(schedule, tmp_path):
    model, data = build()
    keep = KeepMasks()
    fit(model, data, [Pruning(Sparsity(0.9), schedule=schedule, batches=2), keep], tmp_path, 4)
    kept = weights_of_kept(model, TASKS)
    total = sum(w.numel() for w in kept.values())
    counts = [zeros(m, kept) for m in keep.masks]
    assert counts == sorted(counts) and counts[-1] == round(0.9 * total)
    for before, after in zip(keep.masks, keep.masks[1:], strict=False):
        for name in before:
            assert (before[name] | ~after[name]).all(), name


@pytest.mark.parametrize("stop", [1, 2])
def test_stop_and_resume_equals_running_through(tmp_path, stop):
    """Two cuts, before and after the interruption; with dropout and a shuffled loader."""

    def schedule() -> Pruning:
        return Pruning(Sparsity(0.8), schedule=Iterative(rounds=2, every=2, final_sparsity=0.8), batches=2)

    model, data = build()
    straight = schedule()
    fit(model, data, [straight], tmp_path, 3)

    model2, data2 = build()
    part = schedule()
    stopper = StopAfter(stop)
    trainer = fit(model2, data2, [part, stopper], tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    state = torch.load(tmp_path / "part.ckpt", weights_only=True)
    assert not any("mask" in k for k in state["state_dict"])

    model3, data3 = build()
    torch.rand(5)  # the random state at the start of a resumed process is not that of the first
    resumed = schedule()
    fit(model3, data3, [resumed], tmp_path, 3, ckpt_path=str(tmp_path / "part.ckpt"), weights_only=True)
    assert straight.mask.keys() == resumed.mask.keys()
    assert all(torch.equal(straight.mask[n], resumed.mask[n]) for n in straight.mask)
    for (name, a), b in zip(model.network.state_dict().items(), model3.network.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def test_pruning_does_not_change_the_order_of_the_data(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen[-1].append(batch["image"].sum().item())

    for budget in (None, Sparsity(0.5)):
        seen.append([])
        model, data = build()
        fit(model, data, [Pruning(budget, batches=2), Watch()], tmp_path, 2)
    assert seen[0] == seen[1]


def test_bad_input_is_refused_before_training(tmp_path):
    model, data = build()
    for callback, message in [
        (lambda: Pruning(Sparsity(0.5), tasks=["flow"]), "unknown task 'flow'"),
        (lambda: Pruning(Sparsity(0.5), tasks=[]), "no tasks"),
        (lambda: Pruning(Sparsity(0.5), schedule=OneShot(5)), "pruning at epoch 5"),
        (lambda: Pruning(Sparsity(0.5), floor=2.0), "floor 2.0"),
        (lambda: Pruning(Sparsity(0.5), batches=0), "batches 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model, data, [callback()], tmp_path, 1)
    with pytest.raises(ValueError, match="cannot be pruned"):
        fit(BoringModel(), data, [Pruning(Sparsity(0.5))], tmp_path, 1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _process(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    model, data = build(dropout=0.0)
    pruning = Pruning(Sparsity(0.9), tasks=["seg", "depth"], batches=3)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        callbacks=[pruning],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    torch.save({"mask": pruning.mask, "weights": model.network.state_dict()}, f"{folder}/{rank}.pt")


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    """Scores are sums over batches, so two ranks make the mask that one process makes (gloo, CPU)."""
    multiprocessing.start_processes(_process, args=(_free_port(), str(tmp_path)), nprocs=2, start_method="spawn")
    a, b = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    for key in ("mask", "weights"):
        assert all(torch.equal(a[key][n], b[key][n]) for n in a[key] if "running" not in n and "num_batches" not in n)
    model, data = build(dropout=0.0)
    alone = Pruning(Sparsity(0.9), tasks=["seg", "depth"], batches=3)
    fit(model, data, [alone], tmp_path, 1)
    differing = sum(int((alone.mask[n] != a["mask"][n]).sum()) for n in prunable(model.network) if n in alone.mask)
    total = sum(m.numel() for m in alone.mask.values())
    assert differing <= 1e-4 * total  # float32 sums in another order may swap neighbours at the cut-off


class Counting(Sensitivity):
    """CUT's score; remembers how dense the network was at each call, and for which tasks it was called."""

    def __init__(self):
        super().__init__()
        self.density, self.tasks = [], []

    def __call__(self, model, batches, losses, tasks, inputs=None):
        weights = [p for n, p in prunable(model).items() if "edge" not in n and "depth" not in n]
        self.density.append(sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights))
        self.tasks.append(list(tasks))
        return super().__call__(model, batches, losses, tasks, inputs)


def test_rounds_cut_the_same_share_of_what_is_left_and_end_at_the_budget(tmp_path):
    model, data = build()
    scorer = Counting()
    pruning = Pruning(Sparsity(0.9), tasks=["seg", "normal"], scorer=scorer, batches=2, rounds=3)
    fit(model, data, [pruning], tmp_path, 1)
    assert scorer.density == pytest.approx([1, 0.1 ** (1 / 3), 0.1 ** (2 / 3)], abs=1e-3)
    kept = [m for n, m in pruning.mask.items() if n in prunable(model.network)]
    assert sum(int((~m).sum()) for m in kept) == round(0.9 * sum(m.numel() for m in kept))


def test_rounds_within_a_schedule_start_from_what_is_cut_already(tmp_path):
    model, data = build()
    scorer = Counting()
    schedule = Iterative(rounds=2, every=1, final_sparsity=0.9)
    pruning = Pruning(Sparsity(0.9), ["seg", "normal"], scorer, schedule=schedule, batches=2, rounds=2)
    fit(model, data, [pruning], tmp_path, 2)
    assert scorer.density == pytest.approx([1, 0.1**0.25, 0.1**0.5, 0.1**0.75], abs=1e-3)


def test_dropped_tasks_can_have_a_vote(tmp_path):
    masks = {}
    for voters in (None, ["seg", "normal", "depth"]):
        model, data = build()
        scorer = Counting()
        pruning = Pruning(Sparsity(0.9), ["seg", "normal"], scorer, batches=2, voters=voters)
        fit(model, data, [pruning], tmp_path, 1)
        assert scorer.tasks == [voters or ["seg", "normal"]]
        masks[voters is None] = pruning.mask
        assert not any("heads.depth" in n for n in pruning.mask), "dropped heads are not in the mask"
        kept = [m for n, m in pruning.mask.items() if n in prunable(model.network)]
        assert sum(int((~m).sum()) for m in kept) == round(0.9 * sum(m.numel() for m in kept))
    assert any(not torch.equal(m, masks[False][n]) for n, m in masks[True].items())


def test_reconstruction_brings_the_outputs_closer_before_any_training(tmp_path):
    error = {}
    for fitted in (0, 2):
        model, data = build(dropout=0.0)
        model.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
        image = data.score_batches(1)[0]["image"]
        model.network.eval()
        with torch.no_grad():
            before = model.network(image)
        pruning = Pruning(Sparsity(0.5), list(TASKS), batches=2, reconstruct=fitted)
        fit(model, data, [pruning], tmp_path, 1, trainer={"limit_train_batches": 1})
        for name, parameter in model.network.named_parameters():
            if name in pruning.mask:
                assert not parameter.detach()[~pruning.mask[name]].any()
        model.eval()
        with torch.no_grad():
            after = model.network(image)
        error[fitted] = sum(float((after[t] - before[t]).square().mean() / before[t].var()) for t in TASKS)
    assert error[2] < error[0]


@pytest.mark.parametrize(("fit_to", "densities"), [("round", [1.0, 0.1**0.5]), ("dense", [1.0, 1.0])])
def test_rounds_are_fitted_to_the_round_before_or_to_the_dense_network(tmp_path, monkeypatch, fit_to, densities):
    seen = []

    def watched(network, before, mask, batches):
        weights = [before.get_parameter(n) for n in mask if n in prunable(before)]
        seen.append(sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights))

    monkeypatch.setattr("cut.pruning.reconstruct", watched)
    model, data = build()
    pruning = Pruning(Sparsity(0.9), list(TASKS), batches=2, rounds=2, reconstruct=1, fit_to=fit_to)
    fit(model, data, [pruning], tmp_path, 1)
    assert seen == pytest.approx(densities, abs=1e-3)


@pytest.mark.parametrize("given", [{"rounds": 0}, {"reconstruct": -1}, {"recalibrate": -1}, {"fit_to": "first"}])
def test_numbers_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Pruning(Sparsity(0.9), **given)
