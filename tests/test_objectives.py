import pytest
import torch
from torch import nn

from cut.metrics import Accuracy
from cut.objectives import Objective, endless, evaluate, moved, objectives_of


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return {"a": self.drop(x * self.factor), "b": x}


def error(output, batch):
    return (output - batch[1]).abs().mean()


def batches():
    """Two batches of different sizes, so that a mean over batches is not a mean over pictures."""
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)) for n in (2, 6)]


def test_values_are_means_over_pictures_in_eval_mode():
    model, data = Scale().train(), batches()
    found = evaluate(model, data, {"a": Objective(error, {"double": lambda o, b: 2 * error(o, b)})})
    x, y = (torch.cat([b[i] for b in data]) for i in (0, 1))
    expected = float((2 * x - y).abs().mean())
    assert found == pytest.approx({"a/loss": expected, "a/double": 2 * expected})
    assert model.training and model.drop.training


def test_metrics_with_state_get_the_tasks_label_and_start_anew():
    class Classes(nn.Module):
        def forward(self, x):
            return {"kind": x}

    logits = torch.eye(4)
    data = [{"image": logits, "kind": torch.tensor([0, 1, 2, 0])}]
    objective = {"kind": Objective(lambda o, b: o.mean(), {"accuracy": Accuracy()})}
    for _ in range(2):
        assert evaluate(Classes(), data, objective)["kind/accuracy"] == pytest.approx(75, abs=0.1) or 0.75


def test_tasks_that_the_model_does_not_put_out_are_left_out():
    assert set(evaluate(Scale(), batches(), {t: Objective(error) for t in ("b", "z")})) == {"b/loss"}


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        evaluate(Scale(), [], {"a": Objective(error)})
    with pytest.raises(ValueError, match="no batches"):
        next(endless([]))


def test_loader_that_runs_dry_is_named():
    source = endless(iter([1, 2]))
    assert [next(source), next(source)] == [1, 2]
    with pytest.raises(ValueError, match="a second time"):
        next(source)


def test_endless_tells_the_sampler_its_epoch():
    class Sampler:
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    class Loader(list):
        sampler = Sampler()

    source = endless(Loader("ab"))
    assert "".join(next(source) for _ in range(5)) == "ababa"
    assert Loader.sampler.epochs == [0, 1, 2]


def test_objectives_are_read_from_losses_and_pairs():
    whole = Objective(error, weight=3)
    found = objectives_of({"a": error, "b": (error, {"m": error}), "c": whole})
    assert found["a"].loss is error and not found["a"].metrics and found["c"] is whole
    assert found["b"].metrics == {"m": error}


@pytest.mark.parametrize(
    "wrong", [None, {}, [error], {"a": 3}, {"a": (error,)}, {"a": (error, {"m": 3})}, {"a": (3, {})}]
)
def test_what_is_no_objective_is_refused(wrong):
    with pytest.raises(ValueError, match="allowed"):
        objectives_of(wrong)


def test_all_tensors_of_a_batch_move():
    batch = {"image": torch.zeros(1), "more": (torch.ones(1), ["text", torch.zeros(1)])}
    there = moved(batch, "meta")
    assert there["image"].is_meta and there["more"][0].is_meta and there["more"][1][1].is_meta
    assert there["more"][1][0] == "text" and isinstance(there["more"], tuple)
