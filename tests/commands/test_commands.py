"""The way from a model to a file through the command, for one's own model and for ours."""

import json

import pytest
import torch

from cut import checkpoint
from cut.cli import main
from cut.decomposition import prunable
from cut.masks import sparsity
from cut.scores import Sensitivity
from cut.stub import TaskSubset
from tests.commands.own_model import FACTS, Net, pictures

OWN = "tests.commands.own_model:setup"


def told(capsys, *line):
    """What a command printed as JSON, after it worked."""
    assert main([*map(str, line), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def zeros(folder, builder=None):
    network = checkpoint.load(folder, builder)
    network = network.module if isinstance(network, TaskSubset) else network
    return {n: p.detach() != 0 for n, p in prunable(network).items()}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "dense"
    assert main(["fit", OWN, "--steps", "60", "--lr", "0.01", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def pruned(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "pruned"
    line = ["prune", OWN, "--weights", str(fitted), "--tasks", "depth", "--sparsity", "0.8", "--steps", "40"]
    assert main([*line, "--lr", "0.01", "--out", str(folder), "--quiet"]) == 0
    return folder


def test_fitting_ones_own_model_lowers_its_losses(fitted, capsys, tmp_path):
    line = ["fit", OWN, "--steps", 0, "--out", tmp_path / "raw"]
    raw = told(capsys, *line)["metrics"]
    trained = told(capsys, *line, "--weights", fitted)["metrics"]
    assert set(raw) == {"seg/loss", "seg/accuracy", "depth/loss", "count/loss"}
    assert all(trained[f"{t}/loss"] < raw[f"{t}/loss"] for t in ("seg", "depth", "count"))
    assert trained["seg/accuracy"] > raw["seg/accuracy"]


def test_pruned_model_has_the_sparsity_asked_for_over_backbone_and_kept_head(pruned):
    mask = zeros(pruned, Net)
    kept = [n for n in mask if n.split(".")[0] in ("trunk", "low", "depth")]
    assert sparsity(Net(), mask, kept) == pytest.approx(0.8, abs=0.5 / sum(mask[n].numel() for n in kept))
    assert all(mask[n].all() for n in mask if n not in kept), "dropped heads are not cut but removed later"


def test_its_output_is_the_kept_task_and_fine_tuning_pays(pruned, fitted, capsys, tmp_path):
    model = checkpoint.load(pruned, Net)
    assert list(model(pictures(3)[0][0])) == ["depth"]
    line = ["prune", OWN, "--weights", fitted, "--tasks", "depth", "--sparsity", 0.8, "--steps", 0]
    untuned = told(capsys, *line, "--out", tmp_path / "untuned")
    facts = checkpoint.read_metadata(pruned)["cut"]
    assert facts["metrics"]["pruned"]["depth/loss"] < untuned["metrics"]["pruned"]["depth/loss"]
    assert facts["metrics"]["dense"] == pytest.approx(untuned["metrics"]["dense"])
    assert facts["tasks"] == ["depth"] and facts["sparsity"]["kept"] == pytest.approx(0.8, abs=1e-3)


def test_compact_model_gives_the_pruned_ones_outputs_and_is_smaller(pruned, capsys, tmp_path):
    facts = told(capsys, "compact", OWN, "--weights", pruned, "--out", tmp_path / "small")
    image = pictures(5)[0][0]
    expected, found = (checkpoint.load(f, Net)(image)["depth"] for f in (pruned, tmp_path / "small"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert facts["after"]["params"] < facts["before"]["params"] and facts["max_abs_diff"] < 1e-5
    assert facts["after"]["bytes"] == sum(p.stat().st_size for p in (tmp_path / "small").iterdir())


def test_pruning_a_pruned_model_only_cuts_more(pruned, tmp_path):
    line = ["prune", OWN, "--weights", str(pruned), "--sparsity", "0.9", "--steps", "2", "--quiet"]
    assert main([*line, "--out", str(tmp_path / "more")]) == 0
    before, after = zeros(pruned, Net), zeros(tmp_path / "more", Net)
    assert all((after[n] <= before[n]).all() for n in before)
    kept = [n for n in after if n.split(".")[0] in ("trunk", "low", "depth")]
    assert sparsity(Net(), after, kept) == pytest.approx(0.9, abs=1e-3)


def test_fitting_a_pruned_model_keeps_its_zeros(pruned, tmp_path):
    assert main(["fit", OWN, "--weights", str(pruned), "--steps", "5", "--out", str(tmp_path / "m"), "--quiet"]) == 0
    before, after = zeros(pruned, Net), zeros(tmp_path / "m", Net)
    assert all(torch.equal(before[n], after[n]) for n in before if n.split(".")[0] in ("trunk", "low", "depth"))


@pytest.mark.parametrize(("budget", "left"), [("params=900", 900), ("params=0.25", 0.25)])
def test_parameter_budget_is_met_exactly(fitted, budget, left, capsys, tmp_path):
    line = ["prune", OWN, "--weights", fitted, "--tasks", "depth", "--steps", 0, "--budget", budget]
    told(capsys, *line, "--out", tmp_path / "m")
    network = checkpoint.load(tmp_path / "m", Net).module
    mine = [p for n, p in network.named_parameters() if n.split(".")[0] in ("trunk", "low", "depth")]
    total = sum(p.numel() for p in mine)
    # Biases of dead channels are cut on top of the budget.
    found = sum(int((p != 0).sum()) for p in mine)
    goal = left if left > 1 else int(left * total)
    assert goal - 40 <= found <= goal


def test_two_budgets_are_both_met(fitted, capsys, tmp_path):
    line = ["prune", OWN, "--weights", fitted, "--tasks", "depth", "--steps", 0]
    for i, (s, b) in enumerate([(0.5, "params=0.2"), (0.9, "params=0.8")]):
        facts = told(capsys, *line, "--sparsity", s, "--budget", b, "--out", tmp_path / str(i))
        assert facts["sparsity"]["kept"] >= s - 1e-3
        if i == 0:
            assert facts["sparsity"]["kept"] > 0.75


@pytest.mark.parametrize(
    ("budget", "densities"),
    [(["--sparsity", 0.75], (0.63, 0.397)), (["--budget", "params=0.25"], (0.75, 0.5))],
)
def test_rounds_cut_step_by_step_each_scored_on_what_the_one_before_left(
    budget, densities, fitted, capsys, tmp_path, monkeypatch
):
    seen = []
    score = Sensitivity.__call__

    def watched(self, network, *args, **options):
        kept = [
            p for n, p in network.named_parameters() if p.dim() > 1 and n.split(".")[0] in ("trunk", "low", "depth")
        ]
        seen.append(sum(int((p != 0).sum()) for p in kept) / sum(p.numel() for p in kept))
        return score(self, network, *args, **options)

    monkeypatch.setattr(Sensitivity, "__call__", watched)
    line = ["prune", OWN, "--weights", fitted, "--tasks", "depth", "--steps", 0, *budget]
    facts = told(capsys, *line, "--rounds", 3, "--batches", 2, "--out", tmp_path / "m")
    assert seen == pytest.approx([1.0, *densities], abs=0.03)
    assert facts["sparsity"]["kept"] == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("units", [["--sparsity", 0.6], ["--units", "channels", "--budget", "macs=0.4"]])
def test_fitted_weights_give_outputs_nearer_to_those_of_before(units, fitted, capsys, tmp_path):
    line = ["prune", OWN, "--weights", fitted, "--tasks", "seg", "depth", "--steps", 0, *units]
    told(capsys, *line, "--out", tmp_path / "plain")
    told(capsys, *line, "--reconstruct", 4, "--rounds", 2, "--out", tmp_path / "fit")
    image = pictures(5)[0][0]
    dense, plain, fit = (checkpoint.load(f, Net)(image) for f in (fitted, tmp_path / "plain", tmp_path / "fit"))
    for task in ("seg", "depth"):
        assert (fit[task] - dense[task]).pow(2).mean() < (plain[task] - dense[task]).pow(2).mean()
    small = told(capsys, "compact", OWN, "--weights", tmp_path / "fit", "--out", tmp_path / "small")
    assert small["max_abs_diff"] < 1e-4


def prunes_channels(fitted, capsys, out, *line):
    """A cut by channels without training, made compact: what prune told, and the compact model's cost."""
    told_ = told(
        capsys, "prune", OWN, "--weights", fitted, "--units", "channels", "--steps", 0, *line, "--out", out / "p"
    )
    small = told(capsys, "compact", OWN, "--weights", out / "p", "--out", out / "c")
    assert small["max_abs_diff"] < 1e-4
    if "--inside" not in line:  # zeros among what is left go too, where they empty channels
        said, found = told_["compact"]["after"], small["after"]
        assert {k: said[k] for k in ("params", "macs")} == {k: found[k] for k in ("params", "macs")}
        assert found["bytes"] <= said["bytes"] <= found["bytes"] + 3000
    return told_, small["after"]


def test_budgets_of_channels_are_met_by_the_compact_model(fitted, capsys, tmp_path):
    _, dense = prunes_channels(fitted, capsys, tmp_path / "d", "--budget", "macs=1", "--tasks", "seg", "depth")
    line = ["--tasks", "seg", "depth", "--budget", "macs=0.5", "--budget", "params=0.6"]
    facts, small = prunes_channels(fitted, capsys, tmp_path / "s", *line)
    assert small["macs"] <= 0.5 * dense["macs"] and small["params"] <= 0.6 * dense["params"]
    assert facts["units"] == "channels" and facts["budget"] == ["macs=0.5x", "params=0.6x"]
    _, tiny = prunes_channels(fitted, capsys, tmp_path / "b", "--tasks", "seg", "depth", "--budget", "bytes=10kB")
    assert 8000 < tiny["bytes"] <= 10_000 < dense["bytes"]


def test_channels_are_rounded_capped_and_thinned_inside(fitted, capsys, tmp_path):
    line = ["--tasks", "depth", "--sparsity", 0.3, "--rounding", 4, "--cap", 0.75, "--reduce", "mean"]
    prunes_channels(fitted, capsys, tmp_path, *line)
    small = checkpoint.load(tmp_path / "c", Net)
    widths = [m.out_channels for m in small.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels > 1]
    assert widths and all(w % 4 == 0 for w in widths) and max(widths) <= 12
    facts, _ = prunes_channels(fitted, capsys, tmp_path / "i", "--budget", "macs=0.6", "--inside", 0.8)
    assert facts["sparsity"]["kept"] == pytest.approx(0.8, abs=2e-3)


def test_latency_is_searched_for_and_reported(fitted, capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, 0.9 * d, 1.1 * d))
    line = ["--tasks", "depth", "--budget", "latency=0.5x"]
    facts, small = prunes_channels(fitted, capsys, tmp_path, *line)
    reached = facts["latency"]["reading"]
    assert 0.4 < reached["value"] <= 0.5 and reached["low"] < reached["value"] < reached["high"]
    assert facts["latency"]["target"] == "latency=0.5x" and small["params"] < 2000
    assert (tmp_path / "p.latency.json").exists(), "a stopped search goes on from here"


@pytest.mark.parametrize(("slow", "scored"), [([], 2), ([0.6], 3), ([0.6, 0.51], 4)])
def test_rounds_go_on_until_the_latency_is_met(slow, scored, fitted, capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    readings, scorings, score = iter([*slow, 0.48]), [], Sensitivity.__call__

    def watched(self, *args, **options):
        scorings.append(1)
        return score(self, *args, **options)

    def timed(file, dense, target, **options):
        assert options == {"threads": 1} and file.stat().st_size < dense.stat().st_size
        return Reading(value := next(readings), value, value)

    monkeypatch.setattr(Sensitivity, "__call__", watched)
    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, d, d))
    monkeypatch.setattr(speed, "timed", timed)
    line = ["--tasks", "depth", "--budget", "latency=0.5x", "--rounding", 1, "--rounds", 2, "--reconstruct", 2]
    facts, small = prunes_channels(fitted, capsys, tmp_path, *line)
    assert len(scorings) == scored and next(readings, None) is None
    found = facts["latency"]
    assert found["reading"]["value"] == 0.48
    of_search = max(float(d) for d, r in found["readings"].items() if r["value"] <= 0.5)
    most = of_search
    for value in slow:
        most *= min(0.98, 0.5 / value)
    assert 0.6 * most < found["density"] <= most
    assert small["macs"] / facts["compact"]["before"]["macs"] == pytest.approx(found["density"], abs=1e-6)


def test_a_latency_leaves_multiples_of_eight_channels_unless_told_otherwise(fitted, capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, d, d))
    line = ["prune", OWN, "--weights", fitted, "--units", "channels", "--tasks", "depth", "--steps", 0]
    widths = {}
    for rounding in ([], ["--rounding", 1]):
        out = tmp_path / f"p{len(rounding)}"
        told(capsys, *line, *rounding, "--budget", "latency=0.7x", "--out", out)
        kept = checkpoint.load(out, Net)
        weights = [m.weight for n, m in kept.named_modules() if "trunk" in n and hasattr(m, "weight")]
        widths[bool(rounding)] = {int(w.flatten(1).any(1).sum()) for w in weights if w.dim() > 1}
    assert widths[False] <= {8, 16}
    assert widths[True] - {8, 16}
    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(1.0, 1.0, 1.0))
    assert main([*map(str, line), "--budget", "latency=0.7x", "--out", str(tmp_path / "q")]) == 2
    assert "every layer keeps a multiple of 8 channels: --rounding 1 allows smaller" in capsys.readouterr().err


def test_rounds_that_never_meet_a_latency_are_refused(fitted, capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, d, d))
    monkeypatch.setattr(speed, "timed", lambda *args, **_: Reading(0.52, 0.5, 0.6))
    line = ["prune", OWN, "--weights", fitted, "--units", "channels", "--tasks", "depth", "--steps", 0]
    line += ["--budget", "latency=0.5x", "--rounding", 1, "--rounds", 2, "--out", tmp_path / "p"]
    assert main([*map(str, line)]) == 2
    assert "latency=0.5x: 6 rounds more still leave a model that takes 0.52x" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_load_of_the_machine_is_told_with_the_latency_that_was_reached(fitted, capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, 0.9 * d, 1.1 * d, 2.5))
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    line = ["prune", OWN, "--weights", fitted, "--units", "channels", "--steps", 0, "--budget", "latency=0.5x"]
    line += ["--tasks", "depth", "--out", tmp_path / "p"]
    assert main([*map(str, line)]) == 0
    out, err = capsys.readouterr()
    assert "load 1.50 on 4 cores" in out and "the machine is not idle: load 1.50 on 4 cores" in err
    facts = checkpoint.read_metadata(tmp_path / "p")["cut"]["latency"]
    assert facts["load"] == 1.5 and facts["cores"] == 4 and facts["reading"]["load"] == 2.5
    macs = ["prune", OWN, "--units", "channels", "--steps", 0, "--budget", "macs=0.5", "--out", tmp_path / "m"]
    assert main([*map(str, macs)]) == 0
    assert "idle" not in capsys.readouterr().err, "nothing is timed"


def test_latencies_are_read_again_when_anything_changes_that_they_depend_on(tmp_path):
    from cut.cli import parser
    from cut.commands import cutting

    (tmp_path / "a.yaml").write_text("one")
    (tmp_path / "b.yaml").write_text("two")
    base = ["prune", OWN, "--units", "channels", "--budget", "latency=0.5x", "--out", "x"]
    example, net = pictures(0)[0][0], Net()

    def key(*more, network=net, tasks=("depth",), image=example, args=base):
        return cutting.key_of_readings(parser().parse_args([*args, *map(str, more)]), network, tasks, image)

    changes = [
        ["--inside", "0.5"],
        ["--data", tmp_path / "a.yaml"],
        ["--data", tmp_path / "b.yaml"],
        ["--data", "cut.data.rooms.Rooms"],
        ["--sparsity", "0.5"],
        ["--budget", "macs=0.5"],
        ["--rounding", "4"],
        ["--cap", "0.5"],
        ["--floor", "0.1"],
        ["--reduce", "mean"],
        ["--share", "1"],
        ["--batches", "3"],
        ["--seed", "1"],
        ["--runtime", "executorch"],
        ["--threads", "2"],
    ]
    keys = [key(), *(key(*c) for c in changes), key(network=Net()), key(tasks=["seg"]), key(image=example + 1)]
    keys.append(key(args=[w.replace("setup", "described") for w in base]))
    assert len({json.dumps(k, sort_keys=True) for k in keys}) == len(keys)
    assert key("--steps", "7", "--lr", "0.1") == key(), "what is done after the search does not matter"
    (tmp_path / "a.yaml").write_text("two")
    assert key("--data", tmp_path / "a.yaml") != keys[2]
    assert {"processor", "cores", "torch", "name"} <= set(key()["machine"]) and "onnxruntime" in key()["versions"]


@pytest.mark.parametrize("changed", ["torch", "processor", "onnxruntime"])
def test_latencies_of_another_machine_or_version_are_read_again(changed, monkeypatch):
    from cut.cli import parser
    from cut.commands import cutting

    args = parser().parse_args(["prune", OWN, "--out", "x"])
    network, example = Net(), pictures(0)[0][0]
    before = cutting.key_of_readings(args, network, ["depth"], example)
    if changed == "onnxruntime":
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    else:
        monkeypatch.setattr(cutting, "machine", lambda: {**before["machine"], changed: "other"})
    assert cutting.key_of_readings(args, network, ["depth"], example) != before


def test_export_of_ones_own_model(pruned, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "small.onnx"
    facts = told(capsys, "export", OWN, "--weights", pruned, "--out", file)
    assert facts["tasks"] == ["depth"] and facts["bytes"] == file.stat().st_size
    assert facts["max_abs_diff"]["depth"] < 1e-3


DESCRIBED = OWN.replace("setup", "described")


@pytest.mark.parametrize("suffix", ["onnx", pytest.param("pte", marks=pytest.mark.slow)])
def test_exported_file_of_ones_own_model_says_what_it_is_for(suffix, pruned, capsys, tmp_path):
    pytest.importorskip("onnxscript" if suffix == "onnx" else "executorch")
    from cut.runtime import open_file

    told(capsys, "export", DESCRIBED, "--out", tmp_path / f"all.{suffix}")
    told(capsys, "export", OWN, "--weights", pruned, "--out", tmp_path / f"one.{suffix}")
    meta = open_file(tmp_path / f"all.{suffix}").meta
    assert meta["input"] == {"height": 16, "width": 16, **FACTS["input"]}
    assert {t: f["kind"] for t, f in meta["tasks"].items()} == {
        "seg": "segmentation",
        "depth": "depth",
        "count": "classification",
    }
    assert meta["tasks"]["seg"]["classes"] == ["dark", "bright"] and meta["tasks"]["depth"]["unit"] == "m"
    one = open_file(tmp_path / f"one.{suffix}").meta
    assert set(one["tasks"]) == {"depth"} and one["cut"]["tasks"] == ["depth"]
    assert one["input"] == {"height": 16, "width": 16, "mean": [0.0] * 3, "std": [1.0] * 3}


def test_ones_own_model_predicts_what_its_exported_file_predicts(fitted, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from PIL import Image

    Image.new("RGB", (40, 30), (255, 200, 0)).save(tmp_path / "a.png")
    told(capsys, "export", DESCRIBED, "--weights", fitted, "--out", tmp_path / "own.onnx")
    line = ["predict", tmp_path / "a.png", "--out", tmp_path / "seen.png"]
    file = told(capsys, line[0], tmp_path / "own.onnx", *line[1:])
    model = told(capsys, line[0], DESCRIBED, *line[1:], "--weights", fitted)
    for task, numbers in file["tasks"].items():
        assert model["tasks"][task] == pytest.approx(numbers, abs=2e-3)
    assert file["tasks"]["depth"]["unit"] == "m"
    assert set(model["tasks"]["seg"]) <= {"dark", "bright"}
    with Image.open(tmp_path / "seen.png") as drawn:
        assert drawn.width > 3 * 288


def test_a_model_that_says_nothing_of_its_input_is_predicted_with_too(capsys, tmp_path):
    from PIL import Image

    from cut.model import MultiTaskModel
    from cut.network import NetworkConfig
    from cut.tasks import classification, depth

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    module = MultiTaskModel([depth(), classification(("a", "b"))], NetworkConfig("mobilenetv3_small_050", head_width=8))
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, tmp_path / "last.ckpt")
    checkpoint.save(module.network, tmp_path / "run/compact")
    seen = [
        told(capsys, "predict", tmp_path / m, tmp_path / "a.png", "--out", tmp_path / "seen.png")["tasks"]
        for m in ("run", "run/compact", "last.ckpt")
    ]
    assert set(seen[0]) == {"depth", "scene"} and seen[0] == seen[1] == seen[2]
    compact = told(capsys, "compact", tmp_path / "last.ckpt", "--out", tmp_path / "small")
    facts = checkpoint.read_metadata(tmp_path / "small")
    assert compact["tasks"] == list(facts["tasks"]) and facts["input"]["mean"] == list(module.network.mean)


def test_a_map_in_units_of_its_own_is_drawn_over_its_own_range():
    from cut.predict import _panel

    values = torch.linspace(-3, 40, 64).view(1, 8, 8).numpy()
    title, drawn = _panel("height", "map", values)
    assert title == "height: -3 (dark) to 40" and drawn[0, 0].sum() < 100 < 500 < drawn[-1, -1].sum()
    assert (_panel("edge", "map", values / 43 + 3 / 43)[1] == drawn).all()


@pytest.fixture
def timed(monkeypatch):
    """No process is started; what would be timed, and how."""
    from cut import latency

    asked = []

    def compare(files, **options):
        asked.append((dict(files), options))
        timing = latency.Timing(1.0, 2.0, 2, 1, "PyTorch", (1.0, 1.0), 5, 6, 7, 0.0)
        return dict.fromkeys(files, timing)

    monkeypatch.setattr(latency, "compare", compare)
    return asked


def test_int8_accuracy_per_task_of_ones_own_model_is_that_of_its_own_test_loader(fitted, capsys, tmp_path, timed):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name, more in (("float", []), ("int8", ["--int8", "--batches", 4])):
        told(capsys, "export", OWN, "--weights", fitted, "--out", tmp_path / f"{name}.onnx", *more)
    line = ["bench", fitted, tmp_path / "float.onnx", tmp_path / "int8.onnx", "--builder", OWN, "--data", OWN]
    dense, whole, int8 = (m["metrics"] for m in told(capsys, *line)["models"])
    assert timed[0][1]["builder"] == OWN
    trained = told(capsys, "fit", OWN, "--weights", fitted, "--steps", 0, "--out", tmp_path / "same")["metrics"]
    assert dense == pytest.approx(trained, rel=1e-4) and whole == pytest.approx(trained, rel=1e-3)
    assert set(int8) == set(trained) and int8 != pytest.approx(whole, rel=1e-6)
    assert int8["seg/accuracy"] == pytest.approx(whole["seg/accuracy"], abs=0.1)


def test_every_model_of_a_function_has_weights_of_its_own(fitted, pruned, capsys, timed):
    pytest.importorskip("onnxscript")
    line = ["bench", OWN, pruned, OWN, "--weights", fitted, "--weights", pruned, "--builder", OWN]
    report = told(capsys, *line)
    assert [m["weights"] for m in report["models"]] == [str(fitted), None, str(pruned)]
    (files, _), *_ = timed
    assert list(files) == [f"{OWN} {fitted}", str(pruned), f"{OWN} {pruned}"], "errors call models by their names"
    assert [p.suffix for p in files.values()] == [".onnx", "", ".onnx"]


def test_models_of_one_name_are_told_apart(tmp_path):
    from cut.commands.bench import entries_of

    assert [e.label for e in entries_of(["a.onnx", "b", "a.onnx", "a.onnx"], [])] == [
        "a.onnx",
        "b",
        "a.onnx #2",
        "a.onnx #3",
    ]


def test_a_busy_machine_is_told_of_also_to_who_reads_json(fitted, capsys, timed, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for load, warned in ((1.1, False), (1.3, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0, 0))
        assert main(["bench", str(fitted), "--builder", OWN, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["load"] == load and json.loads(out)["cores"] == 4
        assert (f"load {load:.2f} on 4 cores" in err) == warned
        assert main(["bench", str(fitted), "--builder", OWN]) == 0
        assert f"load {load:.2f} on 4 cores" in capsys.readouterr().out
    assert main(["bench", str(fitted), "--builder", OWN, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_bench_times_folders_of_ones_own_model_in_pytorch(fitted, pruned, capsys):
    line = ["bench", fitted, pruned, "--builder", OWN, "--repeats", 3, "--warmup", 1]
    report = told(capsys, *line)
    assert [m["runtime"] for m in report["models"]] == ["PyTorch", "PyTorch"]
    assert all(0 < m["model_bytes"] < 50e6 for m in report["models"]), "what the function made is not counted"


@pytest.mark.slow
def test_int8_and_bench_of_ones_own_model(pruned, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "int8.onnx"
    int8 = told(capsys, "export", OWN, "--weights", pruned, "--out", file, "--int8", "--batches", 2)
    assert int8["int8"] and 1e-6 < int8["max_abs_diff"]["depth"] < 0.2
    report = told(capsys, "bench", OWN, file, "--repeats", 3, "--warmup", 1)
    assert [m["model"] for m in report["models"]] == [OWN, str(file)]
    assert {m["runtime"] for m in report["models"]} == {"ONNX Runtime"}
    assert report["models"][0]["ratio"]["median"] == 1
    assert all(0 < m["median_ms"] <= m["p95_ms"] for m in report["models"])
    assert report["models"][1]["bytes"] == file.stat().st_size


def test_info_tells_shared_from_private_by_gradient(fitted, capsys):
    facts = told(capsys, "info", OWN, "--weights", fitted)
    net = Net()

    def count(*modules):
        return sum(p.numel() for n, p in net.named_parameters() if n.split(".")[0] in modules)

    assert {k: v["params"] for k, v in facts["parts"].items()} == {
        "shared by all": count("trunk"),
        "shared by seg, depth": count("low"),
        "private to seg": count("high", "seg"),
        "private to depth": count("depth"),
        "private to count": count("count"),
    }
    assert facts["params"] == sum(p.numel() for p in net.parameters())


def test_info_draws_a_tree_with_sparsity(pruned, capsys):
    assert main(["info", OWN, "--weights", str(pruned), "--depth", "1"]) == 0
    out = capsys.readouterr().out
    assert "private to depth" in out or "shared by all" in out
    assert "% zero" in out and "└──" in out and "trunk" in out


def test_quiet_prints_nothing(fitted, capsys):
    assert main(["info", OWN, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ our own folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A dense model of ours on the synthetic set, made by the command, and its data's YAML."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "data.yaml").write_text(
        "data:\n  class_path: cut.data.synthetic.Synthetic\n  init_args: {num: 16, batch_size: 4}\n"
    )
    line = ["fit", "mobilenetv3_small_050", "--data", str(folder / "data.yaml"), "--tasks", "seg", "depth", "scene"]
    assert main([*line, "--steps", "4", "--out", str(folder / "dense"), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_a_backbones_name_to_a_prediction(exported, ours, capsys, tmp_path):
    from PIL import Image

    line = ["prune", ours / "dense", "--data", ours / "data.yaml", "--tasks", "seg", "scene", "--sparsity", 0.7]
    facts = told(capsys, *line, "--steps", 2, "--batches", 2, "--out", tmp_path / "pruned")
    assert facts["sparsity"]["kept"] == pytest.approx(0.7, abs=1e-4)
    assert {"seg/miou", "scene/accuracy", "seg/loss"} <= set(facts["metrics"]["pruned"])
    small = told(capsys, "compact", tmp_path / "pruned", "--out", tmp_path / "small")
    assert small["tasks"] == ["seg", "scene"]
    if exported:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        told(capsys, "export", tmp_path / "small", "--out", tmp_path / "small.onnx")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    for model in ("small", "pruned", *(["small.onnx"] if exported else [])):
        seen = told(capsys, "predict", tmp_path / model, tmp_path / "red.png", "--out", tmp_path / "seen.png")
        assert set(seen["tasks"]) == {"seg", "scene"}


def test_same_command_gives_the_same_model(ours, capsys, tmp_path):
    line = ["prune", ours / "dense", "--data", ours / "data.yaml", "--tasks", "depth", "--sparsity", 0.5, "--steps", 2]
    for name in ("a", "b"):
        told(capsys, *line, "--batches", 1, "--out", tmp_path / name)
    a, b = (checkpoint.load(tmp_path / n).state_dict() for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_run_folder_and_lightning_checkpoint_are_models_too(ours, capsys, tmp_path):
    from cut.model import MultiTaskModel
    from cut.network import NetworkConfig
    from cut.tasks import classification, depth

    module = MultiTaskModel([depth(), classification(("a", "b"))], NetworkConfig("mobilenetv3_small_050", head_width=8))
    stored = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(stored, tmp_path / "last.ckpt")
    facts = told(capsys, "info", tmp_path / "last.ckpt")
    assert facts["tasks"] == ["depth", "scene"]
    assert facts["params"] == sum(p.numel() for p in module.network.parameters())
    checkpoint.save(module.network, tmp_path / "run/compact")
    assert told(capsys, "info", tmp_path / "run")["params"] == facts["params"]


@pytest.mark.slow
def test_bench_judges_folders_too(ours, capsys):
    line = ["bench", ours / "dense", "--repeats", 2, "--data", ours / "data.yaml"]
    (model,) = told(capsys, *line)["models"]
    assert model["runtime"] == "PyTorch" and 0 <= model["metrics"]["seg/miou"] <= 100
    assert model["bytes"] == sum(p.stat().st_size for p in (ours / "dense").iterdir())


def test_bench_shows_a_table(ours, capsys, monkeypatch, timed):
    from cut import evaluation

    monkeypatch.setattr(evaluation, "evaluate_file", lambda *_, **__: {"seg/miou": 12.3})
    assert main(["bench", str(ours / "dense"), str(ours / "dense"), "--data", str(ours / "data.yaml")]) == 0
    out = capsys.readouterr().out
    assert "seg/miou" in out and "12.3" in out and "PyTorch" in out and "1.00 (1.00 to 1.00)" in out
