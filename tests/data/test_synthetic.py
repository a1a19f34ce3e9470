import numpy as np
import pytest
import torch

from cut.data.batch import check_batch, picture
from cut.data.filters import FILTERS
from cut.data.synthetic import TASKS, Synthetic


def test_every_task_has_labels_as_documented() -> None:
    data = Synthetic(tasks=TASKS, size=(24, 40), num=8, batch_size=4)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert set(batch) == {"image", *TASKS}
            assert batch["image"].shape[-2:] == (24, 40)
            check_batch(batch, data.tasks)
            assert (batch["depth"] > 0).all()


def test_edges_are_those_of_the_picture() -> None:
    data = Synthetic(tasks=("edge", "keypoint"), num=1, batch_size=1)
    (batch,) = data.score_batches(1)
    shown = picture(batch["image"][0], data.mean, data.std)
    for key, filter_ in FILTERS.items():
        np.testing.assert_allclose(batch[key][0, 0].numpy(), filter_(shown), atol=1e-5)


def test_pictures_depend_on_seed_split_and_index_only() -> None:
    def images(seed: int, split: str) -> list[torch.Tensor]:
        data = Synthetic(num=4, seed=seed)
        data.setup()
        return [data.splits[split][0, index]["image"] for index in range(len(data.splits[split]))]

    assert all(torch.equal(a, b) for a, b in zip(images(1, "train"), images(1, "train"), strict=True))
    every = [image for seed in (1, 2) for split in ("train", "val", "test") for image in images(seed, split)]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_labels_can_be_learned_from_the_picture() -> None:
    torch.manual_seed(0)
    data = Synthetic(tasks=("seg", "normal", "depth"), size=(24, 24), num=32, batch_size=16)
    data.setup()
    outputs = {task.name: task.channels for task in data.tasks}
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 24, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(24, sum(outputs.values()), 3, padding=1),
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    history = []
    for _ in range(25):
        for batch in data.train_dataloader():
            found = dict(zip(outputs, net(batch["image"]).split(list(outputs.values()), 1), strict=True))
            losses = torch.stack([task.loss(found[task.name], batch) for task in data.tasks])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            history.append(losses.detach())
    first, last = torch.stack(history[:2]).mean(0), torch.stack(history[-2:]).mean(0)
    assert (last < 0.5 * first).all(), (first, last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("seg", "pose")}, "no task 'pose'; allowed: seg, normal"),
        ({"tasks": ("seg", "seg")}, "each once"),
        ({"tasks": ()}, "at least one"),
        ({"size": (1, 8)}, r"size \(1, 8\)"),
        ({"num": 0}, "num 0"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**arguments)
