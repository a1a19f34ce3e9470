"""The base of all data modules: loaders with a fixed order, and batches for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from cut.data.batch import Batch
from cut.data.sampling import PartSampler, SeededSampler
from cut.tasks import Task

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class MultiTaskData(pl.LightningDataModule):
    """A data set with its tasks.

    A subclass fills ``self.splits`` in :meth:`setup` with data sets for ``train``, ``val`` and ``test``, whose items are asked
    for as ``(epoch, index)``, and with ``plain``: the training pictures without augmentation.

    Args:
        tasks: The tasks that batches carry labels for.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation, RGB in [0, 1].
        std: Standard deviation of it.
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
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}; allowed: at least 1")
        self.tasks = list(tasks)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.splits: dict[str, Dataset[Any]] = {}

    def _loader(self, split: str, train: bool = False) -> DataLoader[Any]:
        data = self.splits[split]
        if train and len(data) < self.batch_size:  # type: ignore[arg-type]
            raise ValueError(f"batch_size {self.batch_size} is larger than the training set ({len(data)} pictures)")  # type: ignore[arg-type]
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=SeededSampler(data, self.seed) if train else PartSampler(data),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            drop_last=train,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches; the last incomplete one is dropped."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation pictures in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All test pictures in order."""
        return self._loader("test")

    def score_batches(self, n: int, batch_size: int | None = None) -> list[Batch]:
        """The fixed list of batches that weights are scored on: training pictures without augmentation.

        The list depends on the seed only; no random state is touched. Beyond the end of the set it starts over.

        Args:
            n: Number of batches.
            batch_size: Pictures per batch; default the module's.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        if n < 1:
            raise ValueError(f"{n} scoring batches; allowed: at least 1")
        self.setup("fit")
        data, size = self.splits["plain"], batch_size or self.batch_size
        total = len(data)  # type: ignore[arg-type]
        order: list[int] = []
        generator = torch.Generator().manual_seed(self.seed)
        while len(order) < n * size:
            order += torch.randperm(total, generator=generator).tolist()
        chunks = [order[i * size : (i + 1) * size] for i in range(n)]
        return [default_collate([data[0, index] for index in chunk]) for chunk in chunks]

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed and sizes, for records."""
        self.setup("fit")
        sizes = {s: len(d) for s, d in self.splits.items() if s != "plain"}  # type: ignore[arg-type]
        return {"name": self.name, "seed": self.seed, "splits": sizes}
