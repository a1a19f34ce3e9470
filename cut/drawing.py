"""Drawing: what tasks put out, as pictures. Pure functions from arrays to uint8 RGB [H, W, 3]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Distinct in hue and lightness; neighbours in the list differ in both.
PALETTE = np.array(
    [
        (174, 199, 232), (140, 86, 75), (230, 230, 230), (214, 39, 40), (255, 187, 20), (31, 119, 180),
        (255, 127, 14), (148, 103, 189), (255, 240, 110), (44, 160, 44), (23, 60, 120), (23, 190, 207),
        (227, 119, 194), (127, 127, 127), (90, 60, 20), (152, 223, 138), (197, 176, 213), (188, 189, 34),
        (255, 152, 150), (57, 59, 121), (99, 121, 57), (132, 60, 57), (123, 65, 115), (206, 219, 156),
    ],
    np.uint8,
)  # fmt: skip
# Anchors of perceptually ordered maps: dark to light for responses, near (light) to far (dark) for depth.
_INFERNO = [
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
]
_VIRIDIS = [
    (68, 1, 84),
    (70, 50, 126),
    (54, 92, 141),
    (39, 127, 142),
    (31, 161, 135),
    (74, 193, 109),
    (160, 218, 57),
    (253, 231, 37),
]


def _mapped(values: np.ndarray, anchors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Values in [0, 1] through a colour map given by evenly spaced anchors."""
    at = np.clip(values, 0, 1) * (len(anchors) - 1)
    table = np.array(anchors, float)
    return (
        np.stack([np.interp(at, np.arange(len(anchors)), table[:, c]) for c in range(3)], -1).round().astype(np.uint8)
    )


def classes(labels: np.ndarray) -> np.ndarray:
    """A class map [H, W] in the palette; 255 is black.

    Example:
        >>> classes(np.array([[0, 255]])).tolist()
        [[[174, 199, 232], [0, 0, 0]]]
    """
    coloured = PALETTE[labels.astype(int) % len(PALETTE)].copy()
    coloured[labels == 255] = 0
    return coloured


def normals(vectors: np.ndarray) -> np.ndarray:
    """Vectors [3, H, W] as colours (n + 1) / 2; zero vectors are black."""
    length = np.linalg.norm(vectors, axis=0, keepdims=True)
    unit = vectors / np.maximum(length, 1e-6)
    coloured = ((unit + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
    coloured[length[0] < 1e-6] = 0
    return coloured


def depth(metres: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depths [H, W] between near (light) and far (dark); unknown (0) is black."""
    coloured = _mapped(1 - (metres - near) / max(far - near, 1e-6), _VIRIDIS)
    coloured[metres <= 0] = 0
    return coloured


def response(values: np.ndarray) -> np.ndarray:
    """A map in [0, 1], dark to light; NaN is black."""
    return _mapped(np.nan_to_num(values), _INFERNO)


def output(kind: str, values: np.ndarray, near: float = 0.5, far: float = 6.0) -> np.ndarray:
    """A dense task's output or label as a picture.

    Args:
        kind: ``segmentation`` (logits [C, H, W] or labels [H, W]), ``normals`` [3, H, W], ``depth`` or
            ``map`` [1, H, W].
        values: The array.
        near: Depth drawn lightest, in metres.
        far: Depth drawn darkest.

    Raises:
        ValueError: If there is no picture of that kind.
    """
    if kind == "segmentation":
        return classes(values.argmax(0) if values.ndim == 3 else values)
    if kind == "normals":
        return normals(values)
    if kind == "depth":
        return depth(values.reshape(values.shape[-2:]), near, far)
    if kind == "map":
        return response(values.reshape(values.shape[-2:]))
    raise ValueError(f"no picture of kind {kind!r}; allowed: 'segmentation', 'normals', 'depth', 'map'")


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


def legend(names: Sequence[str], present: Sequence[int], width: int, size: int = 14) -> Image.Image:
    """Swatches and names of some classes, wrapped to a width."""
    places, x, y = [], 0, 0
    for index in present:
        text = names[index].replace("_", " ")
        step = int(font(size).getlength(text)) + size + 18
        if x + step > width and x:
            x, y = 0, y + size + 10
        places.append((x, y, index, text))
        x += step
    sheet = Image.new("RGB", (width, y + size + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for x, y, index, text in places:
        draw.rectangle(
            (x, y + 2, x + size, y + size + 2),
            fill=tuple(int(v) for v in PALETTE[index % len(PALETTE)]),
            outline="#666",
        )
        draw.text((x + size + 5, y), text, fill="black", font=font(size))
    return sheet


def sheet(panels: Sequence[tuple[str, np.ndarray]], below: Image.Image | None = None, scale: int = 1) -> Image.Image:
    """Titled pictures side by side, with something (a legend) below."""
    height, width = panels[0][1].shape[0] * scale, panels[0][1].shape[1] * scale
    gap, top = 8, 24
    full = Image.new(
        "RGB",
        ((width + gap) * len(panels) + gap, height + top + gap + (below.height + gap if below else 0)),
        "white",
    )
    draw = ImageDraw.Draw(full)
    for i, (title, array) in enumerate(panels):
        x = gap + i * (width + gap)
        draw.text((x, 4), title, fill="black", font=font(14))
        full.paste(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST), (x, top))
    if below:
        full.paste(below, (gap, top + height + gap))
    return full
