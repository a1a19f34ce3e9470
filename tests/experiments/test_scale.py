"""Paper scale: the same path with a tiny network, the bench's line, the estimate and the page that holds it."""

import json
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from cut.network import MultiTaskNet, NetworkConfig
from experiments import bench, estimate, papers, scale

TINY = NetworkConfig("test_resnet", output_stride=8, head="aspp", head_width=8, dropout=0.5)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return scale.run(tmp_path_factory.mktemp("scale"), TINY, side=32)


# --- the run ---


def test_every_step_runs_and_is_measured(report):
    assert [s.name for s in report.stages] == list(scale.STAGES)
    assert all(s.seconds >= 0 and s.peak > 1e7 for s in report.stages)
    assert report.seconds == pytest.approx(sum(s.seconds for s in report.stages))
    assert report.peak == max(s.peak for s in report.stages)


def test_the_results_are_right(report):
    assert report.exact and report.same and report.difference < 1e-3 and report.right and report.within
    assert report.sparsity == pytest.approx(0.9, abs=1e-3)
    assert report.saved > 0 and report.exported > 0
    net = MultiTaskNet({t.name: t.channels for t in scale.five_tasks()}, config=TINY)
    assert report.params == sum(p.numel() for p in net.parameters())


def test_slow_large_or_wrong_is_not_within(report):
    slow = scale.Stage("build", scale.MOST_SECONDS + 1.0, 1)
    large = scale.Stage("build", 0.0, scale.MOST_BYTES + 1)
    for wrong in ({"stages": (slow,)}, {"stages": (large,)}, {"exact": False}, {"same": False}, {"difference": 1.0}):
        assert not replace(report, **wrong).within


def test_the_network_is_the_papers():
    """Parameters by arithmetic: ResNet34 without its classifier, and four branches a head."""
    config, tasks = scale.paper_config(), scale.five_tasks()
    assert (config.backbone, config.head, config.head_width, config.output_stride) == ("resnet34", "aspp", 1024, 8)
    assert [t.channels for t in tasks] == [17, 3, 1, 1, 1]
    with torch.device("meta"):
        found = sum(p.numel() for p in MultiTaskNet({t.name: t.channels for t in tasks}, config=config).parameters())
    branches = [
        (512 * 9 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * t.channels + t.channels) for t in tasks for _ in "1234"
    ]
    assert found == 21_284_672 + sum(branches)
    assert found == pytest.approx(136.76e6, rel=1e-3)


def test_the_batch_fits_the_tasks():
    batch = scale.random_batch(2, 16, torch.Generator().manual_seed(0))
    net = MultiTaskNet({t.name: t.channels for t in scale.five_tasks()}, config=TINY).eval()
    outputs = net(batch["image"])
    assert all(torch.isfinite(t.loss(outputs[t.name], batch)) for t in scale.five_tasks())


def test_the_benchs_line_comes_from_a_process_of_its_own(report, monkeypatch):
    calls = []

    def child(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "chatter\n" + json.dumps(asdict(report)) + "\n")

    monkeypatch.setattr(subprocess, "run", child)
    line = bench.MEASURES["paper_scale"]()
    assert calls[0][-3:] == ["-m", "experiments.scale", "--json"]
    assert line["name"] == "paper_scale" and line["ok"] and line["value"] == pytest.approx(report.seconds, abs=1e-3)
    assert line["target"] == "<= 600 s, <= 12 GB"
    assert all(name in line["detail"] for name in scale.STAGES)


def test_a_dead_child_is_an_error(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, -9, ""))
    with pytest.raises(subprocess.CalledProcessError):
        scale.paper_scale()


def test_the_command_prints_and_says_whether_it_is_within(report, monkeypatch, capsys):
    monkeypatch.setattr(scale, "run", lambda folder: report)
    assert scale.main([]) == 0 and "compact" in capsys.readouterr().out
    assert scale.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == report.params
    monkeypatch.setattr(scale, "run", lambda folder: replace(report, same=False))
    assert scale.main([]) == 1


# --- the estimate ---


@pytest.fixture(scope="module")
def text():
    return estimate.page()


def test_the_page_holds_what_the_command_prints(text):
    """``python -m experiments.scale --estimate --write`` writes it anew."""
    page = estimate.PAGE.read_text()
    assert estimate.updated(page, text) == page


def test_the_command_prints_it(text, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- table:estimate -->\nold\n<!-- end -->\nbelow\n")
    monkeypatch.setattr(estimate, "page", lambda: text)
    monkeypatch.setattr(estimate, "PAGE", page)
    assert scale.main(["--estimate"]) == 0 and text in capsys.readouterr().out
    assert "old" in page.read_text()
    assert scale.main(["--estimate", "--write"]) == 0
    assert page.read_text() == f"above\n<!-- table:estimate -->\n{text}<!-- end -->\nbelow\n"


def test_multiply_accumulates_of_a_head_by_arithmetic():
    """NYU-v2 at 480x640: output stride 8 gives 60x80 places, and a head multiplies its weights at each of them."""
    both, one = (
        estimate.forward_macs("model/deeplab_resnet34", "nyuv2", t, (480, 640)) for t in (("seg", "normal"), ("seg",))
    )
    assert both - one == 60 * 80 * 4 * (512 * 9 * 1024 + 1024 * 1024 + 1024 * 3)
    assert both == pytest.approx(337.8e9, rel=0.04)  # the reference's network has an output of 61x81


@pytest.mark.parametrize("name", papers.SETS)
def test_macs_of_some_tasks_are_those_of_their_network(name):
    tasks, size = papers.SETS[name].tasks[-1:], (64, 64)
    with torch.device("meta"):
        direct = estimate.network("model/mobilenetv2", estimate.channels(name, tasks))
    expected = estimate.macs(direct, torch.zeros(1, 3, *size, device="meta"))
    assert estimate.forward_macs("model/mobilenetv2", name, tasks, size) == expected


def test_what_autograd_keeps_of_a_layer(monkeypatch):
    """A convolution keeps its input, log-softmax its output; what parameters hold does not count."""
    monkeypatch.setattr(estimate, "network", lambda model, outputs: OneLayer())
    estimate.kept_activations.cache_clear()
    found = estimate.kept_activations("none", "nyuv2", 2, 10, False)
    estimate.kept_activations.cache_clear()
    assert found == 2 * 10 * 10 * (3 + 5) * 4


class OneLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return {"a": self.conv(x)}


def test_work_of_a_dense_run_by_hand():
    found = estimate.work("nyuv2", papers.dense("nyuv2", "paper"))
    forward = estimate.forward_macs("model/deeplab_resnet34", "nyuv2", papers.SETS["nyuv2"].tasks, (321, 321))
    assert found.train.flops == 6 * forward * 16 * 20_000 and found.train.pictures == 320_000
    assert found.score.flops == 0
    assert found.evaluate.pictures == 8 * (79.5 + 654)


def test_the_slower_of_loading_and_computing_decides():
    assert estimate.Part(3600e12, 0).hours(1e12) == 1
    assert estimate.Part(0, 3600 * estimate.LOADED).hours(1e12) == 1
    assert estimate.Part(3600e12, 7200 * estimate.LOADED).hours(1e12) == 2


def test_every_run_of_a_grid_is_counted_once():
    cells = estimate.grid_cells("cityscapes", "paper")
    assert len({c.id for c in cells}) == len(cells) and cells[0].start is None
    assert {c.id for c in cells} == {c.id for c in papers.grid("cityscapes", "paper").cells()}
