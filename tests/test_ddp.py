"""Two processes do what one does: scores, masks and metrics (gloo, CPU), with pictures that cannot be shared evenly."""

import os
import socket

import lightning.pytorch as pl
import pytest
import torch
from torch import multiprocessing

from cut.budget import Sparsity
from cut.data.synthetic import Synthetic
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from cut.pruning import Pruning

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]

TASKS = ("seg", "normal", "depth", "edge", "scene")
KEPT = ["seg", "depth"]
PICTURES = 7  # to validate and to test on: 4 and 3, in batches of 2 and 2, 2 and 1


def trainer(devices: int, folder: str, strategy, callback: pl.Callback, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        limit_train_batches=1,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(devices: int, folder: str, strategy=lambda: "auto") -> dict:
    """Judge a model in every way, then cut it and train one step."""
    pl.seed_everything(7, verbose=False)
    data = Synthetic(TASKS, size=(32, 32), num=4 * PICTURES, batch_size=2, seed=3)
    model = MultiTaskModel(
        data.tasks,
        NetworkConfig(backbone="test_resnet", head_width=8),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        schedule="constant",
        warmup=0.0,
        families=("corrected", "legacy"),
    )
    judge = Judge()
    found = {}
    first = trainer(devices, folder, strategy(), judge)
    for split, loop in (("val", first.validate), ("test", first.test)):
        (found[f"{split} by the trainer"],) = loop(model, data, verbose=False)
    found |= judge.found
    pruning = Pruning(Sparsity(0.9), tasks=KEPT, batches=5)  # 3 and 2 of them
    trainer(devices, folder, strategy(), pruning, limit_val_batches=0).fit(model, data)
    return {
        "metrics": found,
        "pictures": judge.pictures,
        "scores": pruning.scores,
        "mask": pruning.mask,
        "weights": model.network.state_dict(),
    }


class Judge(pl.Callback):
    """Calls :meth:`MultiTaskModel.evaluate` at the end of the trainer's own loops, as a run's history does."""

    def __init__(self) -> None:
        self.found, self.pictures = {}, {}

    def _judge(self, trainer, model, split) -> None:
        data = trainer.datamodule
        batches = list(data.val_dataloader() if split == "val" else data.test_dataloader())
        self.pictures[split] = sum(len(b["image"]) for b in batches)
        self.found[f"{split} by evaluate"] = model.evaluate(batches, split)

    def on_validation_end(self, trainer, pl_module):
        self._judge(trainer, pl_module, "val")

    def on_test_end(self, trainer, pl_module):
        self._judge(trainer, pl_module, "test")


def _process(rank: int, port: int, folder: str) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ.update(place | {"LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)

    def strategy() -> pl.strategies.DDPStrategy:
        return pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)

    torch.save(run(2, folder, strategy), f"{folder}/{rank}.pt")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process finds, and what each of two finds."""
    folder = str(tmp_path_factory.mktemp("ddp"))
    multiprocessing.start_processes(_process, args=(_free_port(), folder), nprocs=2, start_method="spawn")
    return run(1, folder), *(torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in (0, 1))


def test_every_picture_is_judged_once(results):
    one, *two = results
    for split in ("val", "test"):
        assert one["pictures"][split] == PICTURES
        assert [r["pictures"][split] for r in two] == [4, 3]


@pytest.mark.parametrize("how", ["val by the trainer", "val by evaluate", "test by the trainer", "test by evaluate"])
def test_metrics_are_those_of_the_whole_set(results, how):
    one, *two = (r["metrics"][how] for r in results)
    metrics = {k: v for k, v in one.items() if not k.endswith("loss")}
    assert {k.split("/")[1] for k in metrics} == set(TASKS) and any("/legacy/" in k for k in metrics)
    for rank in two:
        assert {k: rank[k] for k in metrics} == pytest.approx(metrics, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("split", ["val", "test"])
def test_both_ways_to_judge_agree(results, split):
    for found in results:
        by_trainer, by_evaluate = (found["metrics"][f"{split} by {how}"] for how in ("the trainer", "evaluate"))
        names = {k for k in by_evaluate if not k.endswith("loss")}
        assert {k: by_trainer[k] for k in names} == pytest.approx({k: by_evaluate[k] for k in names}, abs=1e-5)


def test_losses_are_those_of_the_whole_set_with_the_trainer(results):
    one, *two = (r["metrics"]["val by the trainer"] for r in results)
    losses = {k: v for k, v in one.items() if k.endswith("loss")}
    assert len(losses) == len(TASKS) + 1
    for rank in two:
        assert {k: rank[k] for k in losses} == pytest.approx(losses, abs=1e-5, rel=1e-5)


def test_losses_of_evaluate_are_those_of_the_ranks_part(results):
    one, *two = (r["metrics"]["val by evaluate"] for r in results)
    whole = {k: (4 * two[0][k] + 3 * two[1][k]) / 7 for k in one if k.endswith("loss")}
    assert whole == pytest.approx({k: one[k] for k in whole}, abs=1e-5, rel=1e-5)


def test_scores_are_sums_over_all_batches(results):
    one, *two = (r["scores"] for r in results)
    assert set(one) == set(KEPT)
    for rank in two:
        for task, scores in one.items():
            assert rank[task].keys() == scores.keys()
            for name, score in scores.items():
                scale = float(score.abs().max().clamp_min(1e-12))
                torch.testing.assert_close(rank[task][name] / scale, score / scale, rtol=1e-5, atol=1e-5, msg=name)
    for task, scores in two[0].items():
        assert all(torch.equal(s, two[1][task][n]) for n, s in scores.items()), "bit for bit, or masks would drift"


def test_both_processes_cut_what_one_cuts(results):
    one, *two = (r["mask"] for r in results)
    for name, mask in two[0].items():
        assert torch.equal(mask, two[1][name]), name
    differing = sum(int((m != two[0][n]).sum()) for n, m in one.items())
    total = sum(m.numel() for m in one.values())
    assert differing <= 1e-5 * total  # float32 sums in another order may swap neighbours at the cut-off; here none


def test_both_processes_end_with_the_same_weights(results):
    _, *two = results
    for name, weight in two[0]["weights"].items():
        if "running" not in name and "num_batches" not in name:  # each rank's own batches
            assert torch.equal(weight, two[1]["weights"][name]), name
    cut = {n: m for n, m in two[0]["mask"].items() if not m.all()}
    assert len(cut) > 10 and all(not two[0]["weights"][n][~m].any() for n, m in cut.items())
