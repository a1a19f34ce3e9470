"""The base of all data modules: loaders with a fixed order, and batches for scoring."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cut.data.batch import Batch, check_batch
from cut.data.sampling import PartSampler, SeededSampler
from cut.tasks import Task

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Split(Dataset[dict[str, Tensor]]):
    """Pictures with labels, asked for as (epoch, index).

    A picture is a function of seed, epoch and index, whatever was asked for before.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One picture with its labels, without the batch dimension (:mod:`cut.data.batch`)."""


class First(Split):
    """The first pictures of a split.

    Args:
        split: The split.
        count: How many of it, at most.
    """

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count = split, min(count, len(split))

    def __len__(self) -> int:
        """Number of pictures."""
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """The split's picture."""
        return self.split[key]


class MultiTaskData(pl.LightningDataModule):
    """A data set with its tasks; a subclass gives the splits in :meth:`load`.

    Order and augmentation depend on seed and epoch only, and no loader touches torch's global random state.

    Args:
        tasks: The tasks that batches carry labels for.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation, RGB in [0, 1].
        std: Standard deviation of it.
        subset: Use the first so many training pictures only; None = all.

    Attributes:
        splits: After :meth:`setup`: ``train``, ``val``, ``test``, and ``plain``, the training pictures
            without augmentation.
    """

    name = "data"

    def __init__(
        self,
        tasks: Sequence[Task],
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        subset: int | None = None,
    ) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks {names}; allowed: at least one, each once")
        for key, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{key} {value}; allowed: at least {least}")
        if subset is not None and subset < 1:
            raise ValueError(f"subset {subset}; allowed: None or at least 1")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}; allowed: three numbers each, std above 0")
        self.tasks = list(tasks)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.mean, self.std, self.subset = tuple(mean), tuple(std), subset
        self.splits: dict[str, Split] = {}

    def load(self) -> dict[str, Split]:
        """The splits ``train``, ``val``, ``test`` and ``plain`` of the whole set.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Check and open the set, once.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        if self.splits:
            return
        splits = self.load()
        if self.subset is not None:
            splits |= {name: First(splits[name], self.subset) for name in ("train", "plain")}
        self.splits = splits

    def _loader(self, split: str) -> DataLoader[Any]:
        train, data = split == "train", self.splits[split]
        sampler = SeededSampler(data, self.seed) if train else PartSampler(data)
        if train and len(sampler) < self.batch_size:
            pictures = f"{len(data)} pictures, {len(sampler)} per process"
            raise ValueError(f"batch_size {self.batch_size} is larger than the training set ({pictures})")
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=train,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches; the last incomplete one is dropped.

        Raises:
            ValueError: If that leaves no batch.
        """
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation pictures in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All test pictures in order."""
        return self._loader("test")

    def score_batches(self, n: int, batch_size: int | None = None) -> list[Batch]:
        """The fixed list of batches that weights are scored on: training pictures without augmentation.

        The list depends on the seed only, in every process; a longer list begins with the shorter one. Beyond
        the end of the set it goes on with a new order of the set. No random state is touched.

        Args:
            n: Number of batches.
            batch_size: Pictures per batch; None = the module's.

        Raises:
            ValueError: If a number is not positive, or a batch is not as :mod:`cut.data.batch` demands.
        """
        size = self.batch_size if batch_size is None else batch_size
        if n < 1 or size < 1:
            raise ValueError(f"{n} scoring batches of {size} pictures; allowed: at least 1 of 1")
        self.setup("fit")
        data = self.splits["plain"]
        order: list[int] = []
        generator = torch.Generator().manual_seed(self.seed)
        while len(order) < n * size:
            order += torch.randperm(len(data), generator=generator).tolist()
        chunks = [order[i * size : (i + 1) * size] for i in range(n)]
        batches = [default_collate([data[0, index] for index in chunk]) for chunk in chunks]
        check_batch(batches[0], self.tasks)
        return batches

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed and pictures per split, for records."""
        self.setup("fit")
        sizes = {split: len(data) for split, data in self.splits.items() if split != "plain"}
        return {"name": self.name, "seed": self.seed, "splits": sizes}
