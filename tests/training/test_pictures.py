"""Strips of panels: the right frame and mask in each, in the right colours."""

import os

import numpy as np
import pytest

from cfbi_jax.data.image_files import VOC_PALETTE, read_frame
from cfbi_jax.inference.video import overlay
from cfbi_jax.training.pictures import GAP, GREY, stack, strip, write_strips


def clip(height, width):
    """Frames of three plain colours, and a label per panel with its own object and place."""
    frames = [np.full((height, width, 3), shade, np.uint8) for shade in (40, 90, 150)]
    labels = np.zeros((4, height, width), np.uint8)
    for i, label in enumerate(labels):
        label[height // 2 : height - 4, 4 + 4 * i : 14 + 4 * i] = i + 1
        label[:, -3:] = 255 if i == 3 else 0
    reference, previous, current = frames
    return reference, labels[0], previous, labels[1], current, labels[2], labels[3]


def panels(picture, width):
    starts = [i * (width + GAP) for i in range(4)]
    for start in starts[1:]:
        assert (picture[:, start - GAP : start] == 255).all()
    return [picture[:, start : start + width] for start in starts]


def test_each_panel_shows_its_frame_under_its_mask():
    arguments = clip(24, 32)
    reference, reference_label, previous, previous_label, current, prediction, truth = arguments
    copies = [array.copy() for array in arguments]
    picture = strip(*arguments)
    assert picture.shape == (24, 4 * 32 + 3 * GAP, 3)
    found = panels(picture, 32)
    np.testing.assert_array_equal(found[0], overlay(reference, reference_label))
    np.testing.assert_array_equal(found[1], overlay(previous, previous_label))
    np.testing.assert_array_equal(found[2], overlay(current, prediction))
    assert (found[3][:, -3:] == GREY).all()
    np.testing.assert_array_equal(found[3][:, :-4], overlay(current, truth)[:, :-4])
    # Said again without `overlay`: edges in full colour, half of it inside, nothing elsewhere.
    for i, (panel, shade) in enumerate(zip(found, (40, 90, 150, 150), strict=True)):
        np.testing.assert_array_equal(panel[12, 4 + 4 * i], VOC_PALETTE[i + 1])
        np.testing.assert_allclose(panel[16, 9 + 4 * i], VOC_PALETTE[i + 1] / 2 + shade / 2, atol=1)
        assert (panel[:12, :-4] == shade).all()
    for array, copy in zip(arguments, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_large_panels_have_different_captions_in_their_corners():
    arguments = clip(240, 320)
    found = panels(strip(*arguments), 320)
    corners = []
    for panel, shade in zip(found, (40, 90, 150, 150), strict=True):
        changed = (panel != shade).any(axis=2)
        assert panel[:40, :120].max() > 200  # the text is white
        assert not changed[40:115, :-4].any() and not changed[:40, 120:-4].any()
        corners.append(panel[:40, :120] > 200)
    for i, corner in enumerate(corners):
        for other in corners[:i]:
            assert (corner != other).any()


def test_strips_are_stacked_and_written(tmp_path):
    wide, narrow = strip(*clip(24, 32)), strip(*clip(20, 30))
    width = wide.shape[1]
    picture = stack([narrow, wide])
    assert picture.shape == (20 + GAP + 24, width, 3)
    np.testing.assert_array_equal(picture[:20, : narrow.shape[1]], narrow)
    np.testing.assert_array_equal(picture[20 + GAP :], wide)
    assert (picture[:20, narrow.shape[1] :] == 255).all()
    assert (picture[20 : 20 + GAP] == 255).all()

    write_strips(tmp_path / "pictures" / "10.png", [narrow, wide])
    np.testing.assert_array_equal(read_frame(tmp_path / "pictures" / "10.png"), picture)
    assert os.listdir(tmp_path / "pictures") == ["10.png"]
    with pytest.raises(ValueError, match="no strips"):
        write_strips(tmp_path / "none.png", [])


def test_captions_are_on_dark_boxes():
    white = np.full((240, 320, 3), 255, np.uint8)
    label = np.zeros((240, 320), np.uint8)
    for panel in panels(strip(white, label, white, label, white, label, label), 320):
        assert (panel[0, :20] == 85).all() and (panel[100] == 255).all()
