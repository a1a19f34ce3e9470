"""The bench: its naive side is right, its file is written, its memory is measured."""

import json

import torch

from cut.fusion import Vote
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import sensitivity
from experiments import bench


def test_naive_scoring_gives_the_same_scores_on_a_small_network():
    torch.manual_seed(0)
    net = MultiTaskNet({"seg": 4, "depth": 1}, config=NetworkConfig("test_resnet", head="aspp", head_width=8)).eval()
    batch = {
        "image": torch.randn(2, 3, 32, 32),
        "seg": torch.randint(4, (2, 32, 32)),
        "depth": torch.randn(2, 1, 32, 32),
    }
    losses = {
        "seg": lambda out, b: torch.nn.functional.cross_entropy(out, b["seg"]),
        "depth": lambda out, b: torch.nn.functional.l1_loss(out, b["depth"]),
    }
    copied, layers = bench.naive_model(net)
    naive = bench.naive_scores(copied, layers, [batch, batch], losses, ["seg", "depth"])
    ours = sensitivity(net, [batch, batch], losses, ["seg", "depth"])
    for task in naive:
        assert set(naive[task]) == set(ours[task])
        for name in naive[task]:
            torch.testing.assert_close(ours[task][name], naive[task][name], rtol=1e-4, atol=1e-7)


def test_scores_of_the_fusion_bench_are_shared_and_private():
    scores = bench.large_scores(tasks=3, shared=2_100_000, private=11_500_000)
    assert {n.split(".")[0] for n in scores["t1"]} == {"trunk", "head1"}
    ranking = Vote(0.5)(scores)
    assert {len(ts) for ts in ranking.tasks_of().values()} == {1, 3}


def test_interleaved_takes_turns():
    order = []
    bench.interleaved(lambda: order.append("a"), lambda: order.append("b"), "x", pairs=3)
    assert "".join(order) == "ab" * 4


def test_memory_is_measured_in_a_fresh_process():
    """Three heads of 23 M and a backbone of 21 M parameters take at least their own 360 MB."""
    assert 3.4e8 < bench.measured_in_child("score") < 3e9


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    rows = {
        "scoring_ratio_3": bench.row("scoring_ratio_3", 0.5, "<= 0.65", True, "x"),
        "fuse_speedup": bench.row("fuse_speedup", 3.0, ">= 5", False, "y"),
    }
    monkeypatch.setattr(bench, "MEASURES", {k: lambda v=v: v for k, v in rows.items()})
    bench.main(["--out", str(tmp_path / "a/bench.json")])
    assert json.loads((tmp_path / "a/bench.json").read_text()) == list(rows.values())
    assert "not kept" in capsys.readouterr().out
