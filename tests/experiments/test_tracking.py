"""What a run puts on W&B, read back from an offline run; nothing needs a key or a network."""

import json
from pathlib import Path

import numpy as np
import pytest

from cut.records import Record, read
from experiments import tracking
from experiments.examples import examples, spread
from experiments.run import run
from tests.experiments.test_run import arguments
from tests.offline_runs import read_run


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A cut run logged offline: what W&B has of it, the record, and what was printed."""
    folder = tmp_path_factory.mktemp("tracked")
    run(arguments("dense", folder))
    more = ["--pruning.tasks=[seg,edge]", "--pruning.batches=2", f"--init={folder / 'dense'}", "--group=rooms"]
    path = run(arguments("cut", folder, *more, logger="logger/wandb"))
    (offline,) = (folder / "cut/wandb").glob("offline-run-*")
    return read_run(offline), read(path), offline


def test_a_run_says_which_table_and_which_job_it_belongs_to(tracked):
    found, record, _ = tracked
    assert (found["run"].run_group, found["run"].job_type, found["run"].project) == ("rooms", "prune", "cut")
    assert found["config"]["record"] == record.id
    assert found["config"]["tasks"] == ["seg", "edge"] and found["config"]["dropped_tasks"] == ["normal", "depth"]


def test_the_resolved_configuration_is_the_records(tracked):
    found, record, _ = tracked
    for part in ("trainer", "data", "model", "pruning"):
        assert set(record.config[part]) <= {k.split(".")[0] for k in found["config"][part]}
    assert found["config"]["pruning"]["batches"] == 2 and record.config["group"] == "rooms"


def test_losses_and_metrics_per_task_and_epoch(tracked):
    found, record, _ = tracked
    keys = {k for step in found["history"] for k in step}
    assert {"train/seg/loss", "train/edge/loss", "val/seg/loss", "val/seg/miou", "val/edge/l1"} <= keys
    logged = [step["val/seg/miou"] for step in found["history"] if "val/seg/miou" in step]
    assert logged[-1] == pytest.approx(record.metrics["val"]["seg/miou"], abs=1e-5)


def test_the_summary_has_the_records_numbers(tracked):
    found, record, _ = tracked
    assert found["summary"]["test/seg/miou"] == record.metrics["test"]["seg/miou"]
    assert found["summary"]["sparsity/backbone"] == record.sparsity["backbone"]
    assert found["summary"]["cost/compact/bytes"] == record.cost["compact"]["bytes"] == found["summary"]["model/bytes"]
    assert found["summary"]["cost/kept_heads/latency_ms"] == record.cost["kept_heads"]["latency"]["median_ms"]
    assert found["summary"]["score_seconds"] == record.score_seconds


def _table(offline: Path, name: str) -> dict:
    (path,) = (offline / "files/media/table").glob(f"{name}_[0-9]*.table.json")
    return json.loads(path.read_text())


def test_layers_and_overlap_are_tables_and_the_overlap_a_picture(tracked):
    found, record, offline = tracked
    layers = _table(offline, "layers")
    assert [row[0] for row in layers["data"]] == list(record.layer_sparsity)
    assert [row[2] for row in layers["data"]] == pytest.approx(list(record.layer_sparsity.values()))
    overlap = {(layer, pair): iou for layer, pair, iou in _table(offline, "overlap")["data"]}
    assert overlap == {(n, p): v for n, pairs in record.mask_overlap.items() for p, v in pairs.items()}
    assert found["summary"]["overlap_map._type"] == "image-file"


def test_predictions_stand_beside_their_labels(tracked):
    _, record, offline = tracked
    table = _table(offline, "predictions")
    assert table["columns"] == ["id", "picture", *(f"{t} {w}" for t in record.tasks for w in ("label", "prediction"))]
    assert len(table["data"]) == len(spread(record.data["splits"]["test"], tracking.PICTURES))


def test_the_compact_model_and_its_record_are_artifacts(tracked):
    found, record, _ = tracked
    files = {a.type: {e.path for e in a.manifest.contents} for a in found["artifacts"] if a.type != "run_table"}
    assert files == {"record": {f"{record.id}.json"}, "model": {"model.json", "model.safetensors"}}


def test_the_record_holds_no_path_of_this_machine(tracked):
    _, record, offline = tracked
    saved = [logger["init_args"]["save_dir"] for logger in record.config["trainer"]["logger"]]
    assert saved == [str(offline.parent.parent)] * 2  # outside the checkout a path stays as it was given


def record_of(**more) -> Record:
    facts = {
        "method": "cut",
        "data": {"name": "rooms"},
        "backbone": "net",
        "weights_source": "random",
        "tasks": ["seg"],
        "seed": 1,
        "config": {},
        "metrics": {"test": {"seg/miou": 0.5}},
        "higher_is_better": {"seg/miou": True},
    }
    return Record(**{**facts, **more})


def test_summary_of_a_record_without_cost_or_latency():
    assert tracking.summary(record_of())["test/seg/miou"] == 0.5
    cost = {"compact": {"params": 2, "nonzero": 1, "macs": 3, "bytes": 4, "latency": {"median_ms": 5.0, "p95_ms": 6.0}}}
    found = tracking.summary(record_of(cost=cost, budget={"target": 0.5}))
    assert (found["model/params"], found["model/latency_ms"], found["cost/compact/latency_p95_ms"]) == (2, 5, 6)
    assert all(isinstance(v, float) for v in found.values())


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    """No key anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


class Options(dict):
    """Attributes and ``get``, as jsonargparse's namespaces have them."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def test_without_a_key_a_run_stays_offline_and_says_why(keyless, capsys):
    options = Options(offline=False)
    tracking.prepare(options, "cut-1", "prune", "rooms")
    assert options == {"offline": True, "name": "cut-1", "job_type": "prune", "group": "rooms"}
    assert "no key" in capsys.readouterr().err


def test_without_a_network_a_run_stays_offline_and_says_why(keyless, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert "127.0.0.1 cannot be reached" in str(tracking.why_offline("http://127.0.0.1:9"))


def test_a_key_in_netrc_is_found(keyless):
    (keyless / "netrc").write_text("machine example.org login user password secret\n")
    (keyless / "netrc").chmod(0o600)
    assert tracking.has_key("example.org") and not tracking.has_key("example.com")


def test_names_of_the_users_own_are_kept(keyless):
    options = Options(offline=True, name="mine", job_type="sweep", group="night")
    tracking.prepare(options, "cut-1", "prune", "")
    assert options == {"offline": True, "name": "mine", "job_type": "sweep", "group": "night"}


def test_the_bench_is_a_run_with_its_promises(keyless):
    rows = [{"name": "ratio", "value": 0.5, "target": "<= 0.6", "ok": True, "detail": "half"}]
    tracking.log_bench(rows, keyless)
    (offline,) = (keyless / "wandb").glob("offline-run-*")
    found = read_run(offline)
    assert found["run"].job_type == "bench" and found["summary"]["ratio"] == 0.5
    assert _table(offline, "promises")["data"] == [["ratio", 0.5, "<= 0.6", True, "half"]]


def test_examples_show_classes_by_name_and_maps_as_pictures():
    import torch

    from cut.data.rooms import Rooms

    data = Rooms(tasks=["depth", "scene"])

    class Constant(torch.nn.Module):
        def forward(self, image):
            return {"depth": image[:, :1] * 0 + 2, "scene": torch.eye(len(data.meta["room_types"]))[None, 1]}

    found = examples(data, {"model": Constant().eval()}, ["depth", "scene"], 2)
    assert len(found) == 2 and all(f["tasks"]["scene"]["model"] == data.meta["room_types"][1] for f in found)
    label, drawn = found[0]["tasks"]["depth"]["label"], found[0]["tasks"]["depth"]["model"]
    assert label.shape == drawn.shape == found[0]["picture"].shape and label.dtype == np.uint8
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 1 < len(np.unique(label.reshape(-1, 3), axis=0))
    assert found[0]["tasks"]["scene"]["label"] in data.meta["room_types"]


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_other_loggers_work_by_their_yaml_alone(kind, tmp_path):
    run(arguments("dense", tmp_path, logger=f"logger/{kind}"))
    folder = tmp_path / "dense/lightning_logs/version_0"
    if kind == "csv":
        text = (folder / "metrics.csv").read_text()
        found = set(text.splitlines()[0].split(","))
    else:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        found = set(events.Tags()["scalars"])
    assert {"train/seg/loss", "val/seg/miou", "val/depth/rel"} <= found
