"""A dense run, a pruned run from it, records, loggers, refusals."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from cut import checkpoint
from cut.records import read
from experiments.run import main, parsed, run
from experiments.summary import print_table, rows
from tests.test_configs import line

TINY = {"backbone": "test_resnet", "weights": None, "output_stride": None, "head": "light", "head_width": 8}


def arguments(method: str, folder: Path, *more: str, logger: str = "logger/none") -> list[str]:
    return [
        *line("trainer/default", "data/synthetic", "model/mobilenetv2", f"pruning/{method}", logger),
        "--data.init_args.num=16",
        f"--model.init_args.network={json.dumps(TINY)}",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        f"--out={folder / method}",
        f"--records={folder / 'records'}",
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dense run and a run cut from it, the latter logged to W&B offline."""
    folder = tmp_path_factory.mktemp("runs")
    run(arguments("dense", folder))
    more = ["--pruning.tasks=[seg,edge]", "--pruning.batches=2", f"--init={folder / 'dense'}"]
    run(arguments("cut", folder, *more, logger="logger/wandb"))
    return folder


def records(folder: Path):
    found = {r.method: r for r in map(read, (folder / "records").glob("*.json"))}
    return found["dense"], found["cut"]


def test_the_record_tells_the_whole_story(folder):
    dense, cut = records(folder)
    assert cut.tasks == ["seg", "edge"] and cut.dropped_tasks == ["normal", "depth"]
    assert cut.budget["target"] == 0.9 and cut.budget["achieved"] == pytest.approx(0.9, abs=5e-4)
    assert cut.sparsity["kept"] == pytest.approx(0.9, abs=5e-4)
    assert cut.sparsity["whole_model_with_dropped_heads"] > 0.9
    assert set(cut.metrics) == {"val", "test"} and {k.split("/")[0] for k in cut.metrics["test"]} == {
        "seg",
        "edge",
    }
    assert set(cut.higher_is_better) == set(cut.metrics["test"])
    assert len(cut.history) == 1 and cut.finetune_seconds > 0 and cut.score_seconds > 0 and cut.peak_memory > 1e8
    assert cut.cost["compact"]["nonzero"] < cut.cost["kept_heads"]["params"] < cut.cost["dense_all_heads"]["params"]
    assert cut.cost["compact"]["bytes"] == sum(p.stat().st_size for p in (folder / "cut/compact").iterdir())
    assert max(cut.cost["compact"]["onnx"]["max_abs_diff"].values()) < 1e-3
    assert cut.mask_overlap and all(0 <= v <= 1 for pairs in cut.mask_overlap.values() for v in pairs.values())
    assert dense.config["model"]["init_args"]["network"]["backbone"] == "test_resnet"
    assert dense.data["splits"]["train"] == 16


def test_the_compact_model_is_the_trained_one(folder):
    small = checkpoint.load(folder / "cut/compact").eval()
    state = torch.load(folder / "cut/last.ckpt", weights_only=True)["state_dict"]
    assert set(small(torch.zeros(1, 3, 32, 32))) == {"seg", "edge"}
    kept = state["network.heads.edge.out.weight"]
    assert int((small.heads["edge"].out.weight != 0).sum()) == int((kept != 0).sum())


def test_a_run_with_a_record_is_not_run_again(folder):
    before = {p: p.stat().st_mtime_ns for p in (folder / "dense").rglob("*")}
    run(arguments("dense", folder))
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "dense").rglob("*")}


def test_wandb_wrote_an_offline_run_without_key_or_network(folder):
    found = list((folder / "cut/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1 and found[0].stat().st_size > 0
    assert (folder / "cut/lightning_logs/version_0/metrics.csv").exists()


def test_summary_rows(folder, capsys):
    dense, cut = records(folder)
    found = rows(dense, [cut])
    assert [(r["method"], r["tasks"]) for r in found] == [
        ("dense", dense.tasks),
        ("dense", ["seg", "edge"]),
        ("cut", ["seg", "edge"]),
    ]
    assert found[1]["params"] == found[1]["nonzero"] or found[1]["nonzero"] > 0.99 * found[1]["params"]
    needed = {
        "method",
        "tasks",
        "sparsity",
        "delta_m",
        "params",
        "nonzero",
        "bytes",
        "macs",
        "latency_ms",
        "metrics",
    }
    assert all(needed <= set(r) for r in found)
    json.dumps(found)
    print_table(found, {"seg/miou": "mIoU"})
    assert "dense, 4 heads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pruning.tasks=[seg,flow]"], "unknown task 'flow'"),
        (["--pruning.tasks=[seg,seg]"], "twice"),
        (["--pruning.tasks=[]"], "no tasks"),
        (["--pruning.budget.init_args.target=1.0"], "sparsity 1.0"),
        (["--pruning.budget.init_args.target=0.99"], "the floor needs"),
        (["--init=/nowhere"], "no dense checkpoint"),
        ([f"--model.init_args.network={json.dumps({**TINY, 'backbone': 'nonet'})}"], "timm has no model 'nonet'"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2(folder, tmp_path, more, message, capsys):
    line_ = arguments("cut", tmp_path, f"--init={folder / 'dense'}", "--pruning.batches=1", *more)
    assert main(line_) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.json"))


def test_a_checkpoint_of_another_model_or_other_tasks_is_refused(folder, tmp_path, capsys):
    other = arguments("cut", tmp_path, f"--init={folder / 'dense'}", "--data.init_args.tasks=[seg,depth]")
    assert main(other) == 2
    assert "another model or other tasks" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(folder, tmp_path):
    """The epoch checkpoint of a killed run is taken up, and the result is that of an uninterrupted run."""
    more = [
        "--pruning.tasks=[seg,depth]",
        "--pruning.batches=2",
        f"--init={folder / 'dense'}",
        "--trainer.max_epochs=2",
    ]
    straight = read(run(arguments("cut", tmp_path / "straight", *more)))
    interrupted = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run([*arguments("cut", interrupted, *more), "--trainer.callbacks+=tests.experiments.test_run.Kill"])
    shutil.rmtree(interrupted / "records", ignore_errors=True)
    resumed = read(run(arguments("cut", interrupted, *more)))
    assert len(resumed.history) == 2
    assert resumed.metrics == straight.metrics
    assert resumed.mask_overlap and resumed.mask_overlap == straight.mask_overlap


class Kill(pl.Callback):
    """Stops the program in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_a_cut_without_any_recovery(folder):
    more = ["--pruning.tasks=[seg]", "--pruning.batches=2", f"--init={folder / 'dense'}", "--export=false"]
    given = [a for a in arguments("cut", folder, *more) if not a.startswith(("--trainer.max_epochs", "--out"))]
    record = read(run([*given, "--trainer.max_epochs=0", f"--out={folder / 'bare'}", "--id=bare"]))
    assert record.id == "bare" and record.sparsity["kept"] == pytest.approx(0.9, abs=5e-4) and record.history == []
    before = torch.load(folder / "dense/last.ckpt", weights_only=True)["state_dict"]
    after = torch.load(folder / "bare/last.ckpt", weights_only=True)["state_dict"]
    assert record.start == records(folder)[0].id
    for name, s in record.layer_sparsity.items():
        kept = after[f"network.{name}"] != 0
        assert torch.equal(after[f"network.{name}"][kept], before[f"network.{name}"][kept])
        assert float((~kept).float().mean()) >= s - 1e-6


def test_snapshots_are_the_weights_before_an_epoch(folder):
    out = folder / "snapshots"
    run([*arguments("dense", folder, "--snapshots=[0]", "--id=snapshots", "--export=false"), f"--out={out}"])
    pl.seed_everything(1, verbose=False)
    start = torch.load(out / "epoch-0.ckpt", weights_only=True)["state_dict"]
    end = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    assert start.keys() == end.keys() and any(not torch.equal(start[k], end[k]) for k in start)
    fresh = parsed(arguments("dense", folder)).model.state_dict()
    assert all(torch.equal(start[k], v) for k, v in fresh.items()), "epoch 0 is the initialisation"


def test_every_validated_epoch_has_test_metrics_and_the_last_ones_are_the_records(folder):
    out = folder / "history"
    more = ["--trainer.max_epochs=4", "--trainer.check_val_every_n_epoch=2", "--id=history", "--export=false"]
    record = read(run([*arguments("dense", folder, *more), f"--out={out}"]))
    looked = [any(k.startswith("test/") for k in h) for h in record.history]
    assert looked == [any(k.startswith("val/") for k in h) for h in record.history] == [False, True, False, True]
    for split, metrics in record.metrics.items():
        assert metrics == {k: record.history[-1][f"{split}/{k}"] for k in metrics}
    # Another look at the trained weights, by Lightning's own loop, finds the same.
    cli = parsed(arguments("dense", folder))
    cli.model.load_state_dict(torch.load(out / "last.ckpt", weights_only=True)["state_dict"])
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    for key, value in record.metrics["test"].items():
        assert float(cli.trainer.callback_metrics[f"test/{key}"]) == pytest.approx(value, rel=1e-4, abs=1e-5)
