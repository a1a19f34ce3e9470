import numpy as np
import pytest

from cut import drawing


def test_class_map_has_the_palette_and_black_for_ignored():
    labels = np.array([[0, 3], [255, 5]])
    drawn = drawing.classes(labels)
    assert drawn.dtype == np.uint8 and drawn.shape == (2, 2, 3)
    for place, label in np.ndenumerate(labels):
        assert tuple(drawn[place]) == ((0, 0, 0) if label == 255 else tuple(drawing.PALETTE[label]))


def test_palette_is_distinct_and_long_enough():
    colours = {tuple(c) for c in drawing.PALETTE}
    assert len(colours) == len(drawing.PALETTE) >= 20
    assert (0, 0, 0) not in colours


def test_logits_are_drawn_as_their_largest_class():
    logits = np.random.default_rng(0).normal(size=(5, 4, 6))
    assert (drawing.output("segmentation", logits) == drawing.classes(logits.argmax(0))).all()


def test_normals_are_scaled_to_unit_length_and_unknown_is_black():
    vectors = np.zeros((3, 1, 3))
    vectors[2, 0, 0], vectors[0, 0, 1] = 7.0, -0.2
    assert drawing.normals(vectors).tolist() == [[[128, 128, 255], [0, 128, 128], [0, 0, 0]]]


def test_depth_gets_darker_with_distance_and_unknown_is_black():
    drawn = drawing.depth(np.array([[0.5, 1.0, 2.0, 4.0, 6.0, 0.0]]), 0.5, 6.0)[0].astype(int)
    lightness = drawn @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness[:5]) < 0).all()
    assert drawn[5].tolist() == [0, 0, 0] and drawn[:5].any(1).all()
    assert (drawing.depth(np.full((2, 2), 3.0), 3.0, 3.0) == drawing.depth(np.full((2, 2), 3.0), 3.0, 3.0)).all()


def test_responses_get_lighter_and_stay_in_range():
    drawn = drawing.output("map", np.array([[[-1.0, 0.0, 0.5, 1.0, 9.0, np.nan]]]))[0].astype(int)
    assert (np.diff(drawn[1:4].sum(1)) > 0).all()
    assert (drawn[0] == drawn[1]).all() and (drawn[3] == drawn[4]).all() and (drawn[5] == drawn[1]).all()


def test_unknown_kind_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"'sound'.*'segmentation'"):
        drawing.output("sound", np.zeros((1, 2, 2)))


def test_sheet_shows_every_panel_at_scale_and_the_legend_fits():
    panels = [("a", np.full((4, 6, 3), 10, np.uint8)), ("b", np.full((4, 6, 3), 200, np.uint8))]
    below = drawing.legend(["wall", "dining_table", "sofa"], [0, 2], 120)
    full = np.asarray(drawing.sheet(panels, below, scale=3))
    assert (full == 10).all(-1).sum() >= 12 * 18 and (full == 200).all(-1).sum() >= 12 * 18
    assert below.width == 120
    for index, shown in ((0, True), (1, False), (2, True)):
        assert (np.asarray(below) == drawing.PALETTE[index]).all(-1).any() == shown
