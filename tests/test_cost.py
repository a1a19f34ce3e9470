import pytest
import torch
from torch import nn

from cut.checkpoint import save
from cut.compact import compact, keep_tasks
from cut.cost import Cost, cost, latency, macs, size_on_disk
from tests.small_networks import Cnn, Vit, random_mask, trained
from tests.test_compact import image


def naive_macs(model, x):
    """Multiply-accumulates layer by layer; attention: two products of tokens x tokens x width."""
    total = 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output[0].numel() * module.in_features
        elif hasattr(module, "qkv"):
            tokens, width = output.shape[1:]
            total += 2 * tokens * tokens * width

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("network", [Cnn, Vit])
def test_macs_against_a_naive_count(network):
    model = trained(network())
    assert macs(model, image(n=4)) == naive_macs(model, image(n=1))


def test_cost_of_model_mask_tasks_and_file(tmp_path):
    model = trained(Cnn())
    total = sum(p.numel() for p in model.parameters())
    dense = cost(model, image())
    assert dense == Cost(total, total, naive_macs(model, image(n=1)), None)

    mask = random_mask(model, 0.9)
    zeros = sum(int((~m).sum()) for m in mask.values())
    assert cost(model, image(), mask=mask) == Cost(total, total - zeros, dense.macs, None)

    kept = keep_tasks(model, ["seg"], image())
    of_kept = cost(model, image(), tasks=["seg"], mask=mask)
    assert of_kept.params == sum(p.numel() for p in kept.parameters()) < total
    assert of_kept.macs == naive_macs(kept, image(n=1)) < dense.macs

    smaller = compact(model, ["seg"], mask, image())
    size = save(smaller, tmp_path / "m")
    small = cost(smaller, image(), path=tmp_path / "m")
    assert small.bytes == size == size_on_disk(tmp_path / "m")
    assert small.params < of_kept.params and small.nonzero <= of_kept.nonzero and small.macs < of_kept.macs
    assert all(bool((p != 0).all()) for p in model.parameters())


def test_attention_of_torch_is_counted():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.ones(1, 5, 8)
    assert macs(model, x) == 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    result = cost(model, torch.ones(1, 4))
    assert (result.params, result.macs) == (16, 32)


def test_model_keeps_its_mode():
    model = trained(Cnn()).train()
    model.norm.eval()
    mean = model.low[1].running_mean.clone()
    cost(model, image())
    assert model.training and not model.norm.training and torch.equal(mean, model.low[1].running_mean)


def test_latency_counts_and_restores_threads():
    before = torch.get_num_threads()
    calls = []
    threads = before + 1
    measured = latency(lambda: calls.append(torch.get_num_threads()), threads=threads, warmup=2, repeats=20)
    assert calls == [threads] * 22 and torch.get_num_threads() == before
    assert 0 <= measured.median_ms <= measured.p95_ms and measured.repeats == 20 and measured.threads == threads

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        latency(fail, threads=threads)
    assert torch.get_num_threads() == before


def test_percentile(monkeypatch):
    times = iter(range(1, 21))
    monkeypatch.setattr("cut.cost._milliseconds", lambda fn: float(next(times)))
    measured = latency(lambda: None, repeats=20)
    assert measured.median_ms == 10.5 and measured.p95_ms == 19


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"repeats": 0}, {"warmup": -1}])
def test_bad_arguments(wrong, tmp_path):
    with pytest.raises(ValueError, match="allowed"):
        latency(lambda: None, **wrong)
    with pytest.raises(ValueError, match="no file"):
        cost(nn.Linear(1, 1), torch.ones(1, 1), path=tmp_path / "none")
    with pytest.raises(ValueError, match="unknown task"):
        cost(trained(Cnn()), image(), tasks=["pose"])
