"""Whole units under all that the pruning callback does: resuming, two processes, reconstruction, rounds, bf16."""

import copy
import os

import lightning.pytorch as pl
import pytest
import torch
from torch import multiprocessing

from cut.budget import Sparsity
from cut.decomposition import prunable
from cut.limits import MACs
from cut.pruning import Pruning
from cut.schedules import Gradual, Iterative
from cut.structured import Channels
from cut.units import cut_units
from tests.test_pruning import StopAfter, _free_port, build, fit

KEPT = ["seg", "depth"]


class Remember(pl.Callback):
    """Copies of the network before anything is cut, and after the cut, before the first training step."""

    def __init__(self) -> None:
        self.dense, self.after = None, None

    def on_fit_start(self, trainer, pl_module):
        self.dense = copy.deepcopy(pl_module.network)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.after is None:
            self.after = copy.deepcopy(pl_module.network)


def share_left(pruning) -> float:
    """The share of the dense model's multiply-accumulates that the mask leaves."""
    units = pruning._plan
    gone = cut_units(units.groups, pruning.mask)
    return units.cost.amounts({n: ~g for n, g in gone.items()})["macs"] / units.cost.dense["macs"]


def revived(network, mask) -> list[str]:
    """Parameters that are not zero where the mask cuts them."""
    return [n for n, p in network.named_parameters() if n in mask and p.detach()[~mask[n]].any()]


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("schedule", "stop", "units"),
    [
        (lambda: Iterative(rounds=2, every=2, final_sparsity=0.8), 1, "channels"),
        (lambda: Iterative(rounds=2, every=2, final_sparsity=0.8), 2, Channels("mean", inside=Sparsity(0.7))),
        (lambda: Gradual(0, 2), 2, "channels"),
    ],
    ids=["within a round", "before the second cut, weights inside", "gradual"],
)
def test_stop_and_resume_equals_running_through(schedule, stop, units, tmp_path):
    """With dropout and a shuffled loader; cuts before and after the interruption."""

    def pruning() -> Pruning:
        return Pruning(MACs(0.5), KEPT, schedule=schedule(), batches=2, units=units)

    model, data = build()
    straight = pruning()
    fit(model, data, [straight], tmp_path, 3)

    model2, data2 = build()
    part = pruning()
    fit(model2, data2, [part, StopAfter(stop)], tmp_path, 3).save_checkpoint(tmp_path / "part.ckpt")
    assert not equal(part.mask, straight.mask), "one more cut is to come"

    model3, data3 = build()
    torch.rand(5)  # the random state at the start of a resumed process is not that of the first
    resumed = pruning()
    fit(model3, data3, [resumed], tmp_path, 3, ckpt_path=str(tmp_path / "part.ckpt"), weights_only=True)
    assert equal(straight.mask, resumed.mask) and share_left(resumed) <= 0.5
    assert equal(model.network.state_dict(), model3.network.state_dict())
    assert not revived(model3.network, resumed.mask)


def _pruned(devices: int, strategy, folder) -> dict:
    """Cut by channels and train an epoch."""
    model, data = build(dropout=0.0)
    pruning = Pruning(MACs(0.5), KEPT, batches=3, units="channels")  # 2 and 1 of them with two processes
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
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
    return {"mask": pruning.mask, "scores": pruning.scores, "weights": model.network.state_dict()}


def _process(rank: int, port: int, folder: str) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(place | {"LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    torch.save(_pruned(2, strategy, folder), f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_two_processes_cut_the_units_that_one_cuts(tmp_path):
    multiprocessing.start_processes(_process, args=(_free_port(), str(tmp_path)), nprocs=2, start_method="spawn")
    one = _pruned(1, "auto", tmp_path)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert equal(two[0]["mask"], two[1]["mask"]) and equal(two[0]["mask"], one["mask"])
    for task, scores in one["scores"].items():
        for name, score in scores.items():
            assert torch.equal(two[0]["scores"][task][name], two[1]["scores"][task][name])
            scale = float(score.abs().max().clamp_min(1e-12))
            torch.testing.assert_close(two[0]["scores"][task][name] / scale, score / scale, rtol=1e-5, atol=1e-5)
    for name, weight in two[0]["weights"].items():
        if "running" not in name and "num_batches" not in name:  # each rank's own batches
            assert torch.equal(weight, two[1]["weights"][name]), name
    cut = {n: m for n, m in two[0]["mask"].items() if not m.all()}
    assert len(cut) > 10 and all(not two[0]["weights"][n][~m].any() for n, m in cut.items())


@torch.no_grad()
def outputs(network, image) -> dict[str, torch.Tensor]:
    """What every convolution and linear layer gives, channels last."""
    found = {}
    layers = {f"{n}.weight": m for n, m in network.named_modules() if hasattr(m, "weight")}

    def note(name, out) -> None:
        found[name] = out.movedim(1, -1) if out.ndim == 4 else out

    handles = [layers[n].register_forward_hook(lambda m, args, out, n=n: note(n, out)) for n in prunable(network)]
    network.eval()(image)
    for handle in handles:
        handle.remove()
    return found


def test_reconstruction_lowers_the_error_of_every_layer_and_revives_nothing(tmp_path):
    error, masks = {}, {}
    for fitted in (0, 2):
        model, data = build(dropout=0.0)
        seen = Remember()
        pruning = Pruning(MACs(0.5), KEPT, batches=2, units="channels", reconstruct=fitted)
        fit(model, data, [seen, pruning], tmp_path, 1, trainer={"limit_train_batches": 1})
        image = torch.cat([b["image"] for b in data.score_batches(2)])  # what it is fitted on
        want, got = outputs(seen.dense, image), outputs(seen.after, image)
        masks[fitted] = pruning.mask
        rows = {n: pruning.mask[n].flatten(1).any(1) for n in got if n in pruning.mask}  # no fit helps those cut whole
        error[fitted] = {
            n: float((got[n] - want[n])[..., left].square().sum() / want[n][..., left].square().sum())
            for n, left in rows.items()
        }
        assert not revived(seen.after, pruning.mask) and not revived(model.network, pruning.mask)
    assert equal(masks[0], masks[2]), "fitting comes after the cut"
    assert sum(e > 1e-3 for e in error[0].values()) > 10
    for name, before in error[0].items():
        after = error[2][name]
        assert after < before if before > 1e-6 else after < 1e-6, (name, before, after)


def test_rounds_end_within_the_budget_and_cut_step_by_step(tmp_path):
    model, data = build()
    pruning = Pruning(MACs(0.5), KEPT, batches=2, units="channels", rounds=2, rounding=2)
    seen = []
    cut = pruning._cut
    pruning._cut = lambda *args: (cut(*args), seen.append((share_left(pruning), dict(pruning.mask))))
    fit(model, data, [pruning], tmp_path, 1, trainer={"limit_train_batches": 1})
    (half, first), (last, second) = seen
    assert 0.65 < half <= 0.75 and 0.4 < last <= 0.5
    assert all((first[n] | ~m).all() for n, m in second.items()) and not revived(model.network, second)


def test_bf16_cuts_the_units_that_float32_cuts_and_stays_finite(tmp_path):
    masks = {}
    for precision in ("32-true", "bf16-mixed"):
        model, data = build()
        pruning = Pruning(MACs(0.5), KEPT, batches=2, units=Channels("per_mac"), reconstruct=1, recalibrate=1)
        fit(model, data, [pruning], tmp_path, 1, trainer={"precision": precision, "limit_train_batches": 1})
        assert all(s.isfinite().all() for per in pruning.scores.values() for s in per.values())
        assert all(v.isfinite().all() for v in model.network.state_dict().values())
        assert 0.4 < share_left(pruning) <= 0.5 and not revived(model.network, pruning.mask)
        masks[precision] = pruning.mask
    assert equal(masks["32-true"], masks["bf16-mixed"]), "scores are taken in float32"
