"""bf16 autocast on the paper's family of networks, tiny: dense steps, scoring, masked fine-tuning, two processes."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch import multiprocessing

from cut.budget import Sparsity
from cut.data.synthetic import Synthetic
from cut.decomposition import prunable
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from cut.pruning import Pruning
from cut.scores import Magnitude, Sensitivity, sensitivity
from tests.test_ddp import _free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

TASKS = ("seg", "normal", "depth", "edge", "keypoint")
KEPT = ["seg", "depth"]
PAPER = NetworkConfig("test_resnet", output_stride=8, head="aspp", head_width=8, dropout=0.5)


class Watch(pl.Callback):
    """Notes the types that the first convolution puts out, and the training losses."""

    def __init__(self) -> None:
        self.types, self.losses = set(), []

    def setup(self, trainer, pl_module, stage):
        conv = next(m for m in pl_module.network.modules() if isinstance(m, torch.nn.Conv2d))
        conv.register_forward_hook(lambda module, args, out: self.types.add((pl_module.training, out.dtype)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def build() -> tuple[MultiTaskModel, Synthetic]:
    pl.seed_everything(7, verbose=False)
    data = Synthetic(TASKS, size=(32, 32), num=16, batch_size=4, seed=3)
    model = MultiTaskModel(
        data.tasks,
        PAPER,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=1e-4),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.7),
        families=("corrected", "legacy"),
    )
    return model, data


def trainer(folder, *callbacks: pl.Callback, precision="bf16-mixed", **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        max_epochs=1,
        precision=precision,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def weights(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    return {n: w.detach().clone() for n, w in model.network.named_parameters()}


def test_a_dense_step_computes_in_bf16_and_keeps_float32_weights(tmp_path):
    model, data = build()
    before, watch = weights(model), Watch()
    trainer(tmp_path, watch).fit(model, data)
    assert watch.types == {(True, torch.bfloat16)}
    assert len(watch.losses) > 1 and all(torch.isfinite(torch.tensor(watch.losses)))
    after = weights(model)
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in after.values())
    assert all(not torch.equal(after[n], before[n]) for n in prunable(model.network))


def test_a_dense_step_goes_where_float32_goes(tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        model, data = build()
        watch = Watch()
        trainer(tmp_path, watch, precision=precision).fit(model, data)
        losses[precision] = watch.losses
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


def test_metrics_under_bf16_are_those_of_float32(tmp_path):
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        model, data = build()
        (found[precision],) = trainer(tmp_path, precision=precision).test(model, data, verbose=False)
    assert any("/legacy/" in k for k in found["32-true"])
    for key, value in found["32-true"].items():
        assert found["bf16-mixed"][key] == pytest.approx(value, rel=0.05, abs=0.02), key


def test_scores_under_autocast_are_float32_and_close():
    model, data = build()
    data.setup()
    net, batches = model.network, data.score_batches(2)
    plain = sensitivity(net, batches, model.losses, TASKS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sensitivity(net, batches, model.losses, TASKS)
    for task in TASKS:
        assert mixed[task].keys() == plain[task].keys()
        a, b = (torch.cat([s.flatten() for s in found[task].values()]) for found in (plain, mixed))
        assert b.dtype == torch.float32 and b.isfinite().all()
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98, task


@pytest.mark.parametrize("scorer", [Sensitivity(), Magnitude(per_task=True)], ids=["sensitivity", "magnitude"])
def test_masked_fine_tuning_keeps_the_budget(tmp_path, scorer):
    model, data = build()
    pruning, watch = Pruning(Sparsity(0.9), tasks=KEPT, scorer=scorer, batches=2), Watch()
    trainer(tmp_path, pruning, watch).fit(model, data)
    assert (True, torch.bfloat16) in watch.types and all(torch.isfinite(torch.tensor(watch.losses)))
    kept = {n: w for n, w in prunable(model.network).items() if not n.startswith("heads.") or n.split(".")[1] in KEPT}
    total = sum(w.numel() for w in kept.values())
    assert sum(int((~pruning.mask[n]).sum()) for n in kept) == round(0.9 * total)
    assert all(not w[~pruning.mask[n]].any() and w.dtype == torch.float32 for n, w in kept.items())


def test_the_trainer_scores_in_float32_whatever_its_precision(tmp_path):
    masks = {}
    for precision in ("32-true", "bf16-mixed"):
        model, data = build()
        pruning = Pruning(Sparsity(0.9), tasks=KEPT, batches=2)
        trainer(tmp_path, pruning, precision=precision).fit(model, data)
        masks[precision] = pruning.mask
    assert all(torch.equal(m, masks["bf16-mixed"][n]) for n, m in masks["32-true"].items())


def _process(rank: int, port: int, folder: str) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(place | {"LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    model, data = build()
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    pruning, watch = Pruning(Sparsity(0.9), tasks=KEPT, batches=3), Watch()
    trainer(folder, pruning, watch, devices=2, strategy=strategy).fit(model, data)
    found = {"mask": pruning.mask, "weights": weights(model), "types": watch.types, "losses": watch.losses}
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_in_bf16_end_with_one_model(tmp_path):
    multiprocessing.start_processes(_process, args=(_free_port(), str(tmp_path)), nprocs=2, start_method="spawn")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for found in (one, two):
        assert (True, torch.bfloat16) in found["types"] and all(torch.isfinite(torch.tensor(found["losses"])))
    assert one["losses"] != two["losses"], "each has its own pictures"
    assert all(torch.equal(m, two["mask"][n]) for n, m in one["mask"].items())
    assert all(torch.equal(w, two["weights"][n]) for n, w in one["weights"].items())
    assert all(not one["weights"][n][~m].any() for n, m in one["mask"].items())
