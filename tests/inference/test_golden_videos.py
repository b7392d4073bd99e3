"""The golden videos from first mask to last label."""

import numpy as np
import pytest
import recipe

import cfbi_jax
from cfbi_jax.inference.options import Options
from cfbi_jax.models.images import OFFICIAL_FORMAT
from cfbi_jax.weights.official import convert_state_dict

PROBABILITIES, CLEAR = 3e-4, 1e-3
CASES = {
    "a": ("r101_cfbi", {}),
    "c": ("r101_cfbi", {}),  # a second object, and a second reference, at frame 2
    "e": ("r101_cfbi", {"scales": (1.0, 1.15), "flip": True}),
    "g": ("mbv2_cfbi", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_videos(case):
    """Our own predictions as previous masks: nothing may drift over the frames."""
    name, options = CASES[case]
    arrays = recipe.golden(f"case_{case}")
    segmenter = cfbi_jax.VideoSegmenter(
        *convert_state_dict(recipe.recipe_state_dict(name)), OFFICIAL_FORMAT, Options(**options)
    )
    masks = {int(k.split("_")[-1]): v for k, v in arrays.items() if k.startswith("given_label_")}
    found = list(segmenter.segment(arrays["frames"], masks, return_probabilities=True))
    assert len(found) == len(arrays["frames"])
    label, probabilities = found[0]
    np.testing.assert_array_equal(label, masks[0])
    np.testing.assert_array_equal(probabilities.argmax(axis=0), masks[0])
    assert set(np.unique(probabilities)) == {0.0, 1.0}
    for t, (label, probabilities) in enumerate(found[1:], 1):
        expected = arrays[f"t{t}_prob"]
        free = np.ones(label.shape, bool)
        if t in masks:  # there the golden array is the prediction alone, of the rows known before
            free = masks[t] == 0
            np.testing.assert_array_equal(label[~free], masks[t][~free])
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(
            probabilities[: len(expected), free], expected[:, free], rtol=0, atol=PROBABILITIES
        )
        ordered = np.sort(expected, axis=0)
        clear = free & (ordered[-1] - ordered[-2] > CLEAR)
        np.testing.assert_array_equal(label[clear], arrays[f"t{t}_label"][clear])
