"""How a video is segmented."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence

from cfbi_jax.models.cfbi import DTYPES

# Options that no result depends on, but for rounding.
BOUNDS = ("max_references", "max_objects", "memory_mib")
MAX_OBJECTS = 254  # a pixel's row is 8 bits: the background's, the objects', and 255 for nobody's


@dataclasses.dataclass(frozen=True)
class Options:
    """How a video is segmented. The defaults are exact; what trades exactness is off.

    scales: test scale, or scales, whose probabilities are averaged at the video's own size.
    flip: adds the mirror image of every scale.
    max_long_edge: limit of the long edge in pixels before the scale applies; None: 1040 for a
        single scale, 800 for several, as released.
    global_atrous_rate, local_atrous_rate: match with every r-th row and column of pixels only;
        None: as the network was trained (official ones with 1, all pixels).
    compute_dtype: of the convolutions; matching_dtype: of the embedding distances. float32,
        bfloat16 or float16.
    max_references: how many frames with masks one video may have; more is an error.
    max_objects: None, as many as the masks have. A number: rows are always padded to it, so that
        one compilation serves any video, and more objects are an error.
    memory_mib: what weights and arrays are to fit into, in MiB. Where objects or the video's size
        need more, fewer object rows and lines of pixels are computed at a time; where that is not
        enough, a warning comes, and `VideoSegmenter.plan` says so before (an error for a given
        number). None: 80 % of the device's memory, on CPUs 1 GiB.
    """

    scales: Sequence[float] | float | int = (1.0,)
    flip: bool = False
    max_long_edge: int | None = None
    global_atrous_rate: int | None = None
    local_atrous_rate: int | None = None
    matching_dtype: str = "float32"
    compute_dtype: str = "float32"
    max_references: int = 32
    max_objects: int | None = None
    memory_mib: int | None = None

    def __post_init__(self):
        given = tuple(self.scales) if isinstance(self.scales, Iterable) else (self.scales,)
        if not all(isinstance(scale, numbers.Real) and 0 < scale < math.inf for scale in given):
            raise ValueError(f"scales is {self.scales!r}; expected one or more positive numbers")
        if not given:
            raise ValueError("scales is empty; expected one or more positive numbers")
        object.__setattr__(self, "scales", tuple(float(scale) for scale in given))
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip is {self.flip!r}; expected True or False")
        if not _is_count(self.max_references):
            found = self.max_references
            raise ValueError(f"max_references is {found}; expected an integer, 1 or more")
        for name in ("matching_dtype", "compute_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f'{name} is "{getattr(self, name)}"; expected one of {DTYPES}')
        rates = "global_atrous_rate", "local_atrous_rate"
        for name in (*rates, "max_objects", "max_long_edge", "memory_mib"):
            if getattr(self, name) is not None and not _is_count(getattr(self, name)):
                found = getattr(self, name)
                raise ValueError(f"{name} is {found}; expected None or an integer, 1 or more")
        if self.max_objects is not None and self.max_objects > MAX_OBJECTS:
            raise ValueError(f"max_objects is {self.max_objects}; expected at most {MAX_OBJECTS}")

    def check_object_count(self, count: int) -> None:
        """Raises ValueError for more objects than `max_objects`, or than 254."""
        limit = self.max_objects
        if count > MAX_OBJECTS:
            raise ValueError(f"the masks hold {count} objects; expected at most {MAX_OBJECTS}")
        if limit is not None and count > limit:
            raise ValueError(
                f"the masks hold {count} objects, and max_objects is {limit}: no row is left for "
                f"{count - limit} of them; raise max_objects or leave it None"
            )

    def check_reference_count(self, count: int, video: str = "the video") -> None:
        """Raises ValueError, naming the video, for more masks than `max_references`."""
        limit = self.max_references
        if count > limit:
            raise ValueError(
                f"{video} has masks for {count} frames, and max_references is {limit}: raise "
                "max_references (memory and the time per frame grow with the masks)"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1
