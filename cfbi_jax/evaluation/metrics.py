"""Region similarity J and boundary accuracy F of object masks, and their statistics.

Both follow the official DAVIS 2017 tool (semi-supervised task; Perazzi et al., CVPR
2016; Pont-Tuset et al., 2017):

- J is intersection over union, 1 when both masks are empty.
- F is the harmonic mean of boundary precision and recall. A boundary pixel counts as found when a
  boundary pixel of the other mask lies within a disk of `boundary_radius` pixels.

The definition dilates whole images. Here each object is scored inside the bounding box of its two
masks only, which changes no number: see `_object_crop`.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np
from jaxtyping import Bool, Float64, UInt8

BOUND_TOLERANCE = 0.008
"""Boundary tolerance of the benchmark, as a share of the image diagonal."""

RECALL_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean, recall and decay of a measure; of one object, or averaged over objects."""

    mean: float
    recall: float
    decay: float


@dataclasses.dataclass(frozen=True)
class ObjectScores:
    """J and F of one object, one value per scored frame, in the order of `frames`."""

    sequence: str
    object_id: int
    frames: tuple[str, ...]
    region: Float64[np.ndarray, " frames"]
    boundary: Float64[np.ndarray, " frames"]

    @property
    def region_statistics(self) -> Statistics:
        return statistics(self.region)

    @property
    def boundary_statistics(self) -> Statistics:
        return statistics(self.boundary)


def boundary_radius(height: int, width: int) -> int:
    """Returns the tolerance of F in pixels: 8 at 480 x 854, 9 at 480 x 910."""
    return math.ceil(BOUND_TOLERANCE * math.hypot(height, width))


def boundary_map(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Marks the pixels that differ from their right, lower or lower-right neighbour.

    The last row is compared to the right only, the last column downwards only, the last corner
    never: a mask that ends at the image border has no boundary there.
    """
    boundary = np.zeros_like(mask)
    boundary[:, :-1] = mask[:, :-1] != mask[:, 1:]
    boundary[:-1] |= mask[:-1] != mask[1:]
    boundary[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return boundary


def region_similarity(
    prediction: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]
) -> float:
    """Returns J, the intersection over union of two masks; 1.0 when both are empty."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_f_measure(
    prediction: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    radius: int,
) -> float:
    """Returns F, the harmonic mean of boundary precision and recall.

    Args:
      prediction: the mask to score.
      truth: the true mask.
      radius: tolerance in pixels: `boundary_radius` of the image, of which the masks may be a crop.

    Returns:
      F; 1.0 when neither mask has a boundary, 0.0 when only one has.
    """
    predicted, true = boundary_map(prediction), boundary_map(truth)
    num_predicted, num_true = np.count_nonzero(predicted), np.count_nonzero(true)
    if num_predicted == 0 or num_true == 0:
        return float(num_predicted == num_true)
    precision = np.count_nonzero(predicted & _dilate(true, radius)) / num_predicted
    recall = np.count_nonzero(true & _dilate(predicted, radius)) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score_objects(
    prediction: UInt8[np.ndarray, "height width"],
    truth: UInt8[np.ndarray, "height width"],
    object_ids: tuple[int, ...],
) -> tuple[Float64[np.ndarray, " objects"], Float64[np.ndarray, " objects"]]:
    """Scores the objects of one frame.

    Args:
      prediction: label map to score.
      truth: true label map; a pixel of any id outside `object_ids` (void 255, for one) belongs to
        no object.
      object_ids: the ids to score.

    Returns:
      J and F, in the order of `object_ids`.

    Raises:
      ValueError: when the label maps differ in size.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction is {prediction.shape} and truth {truth.shape} (height, width)"
        )
    radius = boundary_radius(*truth.shape)
    region = np.ones(len(object_ids))
    boundary = np.ones(len(object_ids))
    for i, object_id in enumerate(object_ids):
        predicted, true = prediction == object_id, truth == object_id
        crop = _object_crop(predicted, true)
        if crop is not None:
            region[i] = region_similarity(predicted[crop], true[crop])
            boundary[i] = boundary_f_measure(predicted[crop], true[crop], radius)
    return region, boundary


def recall(values: Float64[np.ndarray, " frames"]) -> float:
    """Returns the share of frames whose value is above 0.5, strictly."""
    return float(np.mean(values > RECALL_THRESHOLD))


def decay(values: Float64[np.ndarray, " frames"]) -> float:
    """Returns the mean of the first quarter of the frames minus the mean of the last one.

    Neighbouring quarters share their border frame. The official tool keeps the borders in 8 bits
    and takes wrong quarters beyond 256 frames; here they are right at any length.
    """
    borders = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    first = values[borders[0] : borders[1] + 1]
    last = values[borders[3] : borders[4] + 1]
    return float(np.mean(first) - np.mean(last))


def statistics(values: Float64[np.ndarray, " frames"]) -> Statistics:
    """Returns mean, recall and decay of at least one frame's values."""
    return Statistics(float(np.mean(values)), recall(values), decay(values))


def mean_statistics(per_object: list[Statistics]) -> Statistics:
    """Averages over objects; every object weighs the same, whatever its number of frames."""
    return Statistics(
        mean=float(np.mean([s.mean for s in per_object])),
        recall=float(np.mean([s.recall for s in per_object])),
        decay=float(np.mean([s.decay for s in per_object])),
    )


def _object_crop(
    predicted: Bool[np.ndarray, "height width"], true: Bool[np.ndarray, "height width"]
) -> tuple[slice, slice] | None:
    """Returns the smallest crop that gives the same J and F as the image; None for empty masks.

    The crop is the bounding box of both masks, grown by one pixel where the image goes on. Outside
    it, and on the grown last row and column, there is neither mask nor boundary, so the border
    rules of `boundary_map` act as they would on the image. Dilation is only looked at on boundary
    pixels, and all of these, hence all pixels they could match, lie inside.
    """
    boxes = [cv2.boundingRect(mask.view(np.uint8)) for mask in (predicted, true)]
    boxes = [box for box in boxes if box[2] > 0]
    if not boxes:
        return None
    left = min(x for x, _, _, _ in boxes)
    top = min(y for _, y, _, _ in boxes)
    right = max(x + width for x, _, width, _ in boxes)
    bottom = max(y + height for _, y, _, height in boxes)
    return slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)


@functools.cache
def _disk(radius: int) -> UInt8[np.ndarray, "diameter diameter"]:
    """Returns the disk x^2 + y^2 <= radius^2 as a structuring element."""
    offsets = np.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)


def _dilate(
    mask: Bool[np.ndarray, "height width"], radius: int
) -> Bool[np.ndarray, "height width"]:
    """Dilates with a disk; what lies outside the array counts as empty."""
    return cv2.dilate(mask.view(np.uint8), _disk(radius)).view(bool)
