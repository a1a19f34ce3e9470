"""A dense run, a pruned run from it, records, loggers, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cut import checkpoint
from cut.records import read
from experiments.run import main, run
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


import lightning.pytorch as pl  # noqa: E402


class Kill(pl.Callback):
    """Stops the program in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
