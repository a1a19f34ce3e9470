"""The base of data modules: loaders, scoring batches, and Lightning's use of them."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from cut.data.base import MultiTaskData, Split
from cut.tasks import classification, depth


class Counting(Split):
    """Pictures that say where they come from: split, epoch and index."""

    def __init__(self, split: int, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        image = torch.zeros(3, 2, 2)
        image[0], image[1], image[2] = self.split, *key
        return {"image": image, "depth": torch.ones(1, 2, 2)}


class CountingData(MultiTaskData):
    def load(self) -> dict[str, Split]:
        return {
            "train": Counting(0, 10),
            "val": Counting(1, 5),
            "test": Counting(2, 3),
            "plain": Counting(3, 10),
        }


def make(**arguments: int) -> CountingData:
    data = CountingData([depth()], **{"batch_size": 4, **arguments})
    data.setup()
    return data


def seen(batches: list[dict[str, Tensor]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(map(int, image[:, 0, 0])) for image in batch["image"]] for batch in batches]


def flat(batches: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [picture for batch in batches for picture in batch]


def test_training_drops_the_incomplete_batch() -> None:
    data = make()
    assert [len(batch) for batch in seen(list(data.train_dataloader()))] == [4, 4]


def test_evaluation_keeps_everything_in_order() -> None:
    data = make()
    assert flat(seen(list(data.val_dataloader()))) == [(1, 0, index) for index in range(5)]
    assert flat(seen(list(data.test_dataloader()))) == [(2, 0, index) for index in range(3)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_reach_the_pictures(num_workers: int) -> None:
    loader = make(num_workers=num_workers).train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        pictures = flat(seen(list(loader)))
        assert {picture[1] for picture in pictures} == {epoch}
        orders.append([picture[2] for picture in pictures])
    assert orders[0] != orders[1]
    plain = make().train_dataloader()
    plain.sampler.set_epoch(1)
    assert [picture[2] for picture in flat(seen(list(plain)))] == orders[1]


def test_loaders_and_scoring_leave_the_random_state_alone() -> None:
    data = make()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    data.score_batches(3)
    assert torch.equal(before, torch.get_rng_state())


def test_scoring_batches_are_fixed_and_come_from_plain_training_pictures() -> None:
    data = make(seed=5)
    five = seen(data.score_batches(5))
    assert five == seen(make(seed=5).score_batches(5)) == seen(data.score_batches(5))
    assert seen(data.score_batches(2)) == five[:2]  # a prefix
    assert five != seen(make(seed=6).score_batches(5))
    pictures = flat(five)
    assert {picture[:2] for picture in pictures} == {(3, 0)}
    assert sorted(p[2] for p in pictures[:10]) == sorted(p[2] for p in pictures[10:]) == list(range(10))


def test_scoring_batches_have_the_size_asked_for() -> None:
    data = make()
    assert [len(batch) for batch in seen(data.score_batches(2, batch_size=3))] == [3, 3]
    assert [len(batch) for batch in seen(data.score_batches(1, batch_size=12))] == [12]
    assert len(CountingData([depth()]).score_batches(1)) == 1  # sets itself up
    for arguments in ((0,), (1, 0)):
        with pytest.raises(ValueError, match="allowed: at least 1"):
            data.score_batches(*arguments)


def test_scoring_batches_are_checked() -> None:
    data = CountingData([depth(), classification("ab")])
    with pytest.raises(ValueError, match="no label 'scene'"):
        data.score_batches(1)


def test_subset_takes_the_first_training_pictures() -> None:
    data = make(subset=6)
    assert data.description["splits"] == {"train": 6, "val": 5, "test": 3}
    indices = {p[2] for p in flat(seen(data.score_batches(3)) + seen(list(data.train_dataloader())))}
    assert indices == set(range(6))
    assert make(subset=99).description["splits"]["train"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0; allowed: at least 1"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"subset": 0}, "subset 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CountingData([depth()], **arguments)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 11 is larger than the training set \(10 pictures"):
        make(batch_size=11).train_dataloader()


class Watching(pl.LightningModule):
    """Learns nothing, and notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown: list[list[tuple[int, ...]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.shown += seen([batch])
        return self.weight * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.shown += seen([batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(epochs: int, folder: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_checkpointing=False,
        **quiet,
    )


def test_stop_and_resume_equals_running_through(tmp_path: object) -> None:
    through = Watching()
    trainer(3, tmp_path).fit(through, make())
    assert {picture[1] for batch in through.shown for picture in batch if picture[0] == 0} == {0, 1, 2}

    first = Watching()
    stopped = trainer(1, tmp_path)
    stopped.fit(first, make())
    stopped.save_checkpoint(f"{tmp_path}/one.ckpt")
    second = Watching()
    trainer(3, tmp_path).fit(second, make(), ckpt_path=f"{tmp_path}/one.ckpt", weights_only=True)

    def training(model: Watching) -> list[list[tuple[int, ...]]]:
        return [batch for batch in model.shown if batch[0][0] == 0]

    assert training(first) + training(second) == training(through)
    assert torch.equal(second.weight, through.weight)
