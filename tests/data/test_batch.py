import numpy as np
import pytest
import torch

from cut import tasks
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD
from cut.data.batch import check_batch, normalise, picture

TASKS = (
    tasks.segmentation("ab"),
    tasks.normals(),
    tasks.depth(),
    tasks.regression_map("edge"),
    tasks.classification("xyz"),
)


def good() -> dict[str, torch.Tensor]:
    normal = torch.zeros(2, 3, 4, 5)
    normal[:, 0, 1:] = 1
    return {
        "image": torch.zeros(2, 3, 4, 5),
        "seg": torch.tensor([0, 1]).view(2, 1, 1).repeat(1, 4, 5),
        "normal": normal,
        "depth": torch.ones(2, 1, 4, 5),
        "edge": torch.full((2, 1, 4, 5), torch.nan),
        "scene": torch.tensor([2, 255]),
    }


def test_a_good_batch_passes() -> None:
    check_batch(good(), TASKS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image", None, "no 'image'"),
        ("image", torch.zeros(2, 4, 5), r"'image' is torch.float32 \[2, 4, 5\]; expected"),
        ("image", torch.full((2, 3, 4, 5), torch.inf), "not finite"),
        ("depth", None, "no label 'depth'"),
        ("seg", torch.zeros(2, 4, 5), r"'seg' is torch.float32 \[2, 4, 5\]; expected torch.int64"),
        ("seg", torch.zeros(2, 1, 4, 5, dtype=torch.long), r"expected torch.int64 \[2, 4, 5\]"),
        ("seg", torch.full((2, 4, 5), 2), "label 2 is out of range: 0 to 1"),
        ("normal", torch.full((2, 3, 4, 5), 0.5), "a vector of 'normal' has length 0.866"),
        ("depth", torch.ones(2, 4, 5), r"'depth' is torch.float32 \[2, 4, 5\]"),
        ("depth", torch.full((2, 1, 4, 5), -1.0), "label -1"),
        ("edge", torch.full((2, 1, 4, 5), 255.0), "label 255"),
        ("scene", torch.tensor([[0], [1]]), r"'scene' is torch.int64 \[2, 1\]"),
    ],
)
def test_a_bad_entry_is_named(key: str, value: torch.Tensor | None, message: str) -> None:
    batch = good()
    if value is None:
        del batch[key]
    else:
        batch[key] = value
    with pytest.raises(ValueError, match=message):
        check_batch(batch, TASKS)


def test_picture_undoes_normalise() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image = normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)
    expected = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert (picture(image, IMAGENET_MEAN, IMAGENET_STD) == pixels).all()
