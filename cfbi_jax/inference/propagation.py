"""One video under way: from its frames and masks to labels, frame by frame.

What the network remembers is an explicit, immutable `State`; two jitted functions (`programs`) do
the work, and everything here is bookkeeping between a user's ids and the network's rows.

    frame --> embed ------------> features ---+--> predict --> label, probabilities
                                   State -----+        |
                                     ^                 v
                                     +---- remember (previous frame; a reference if it came
                                                     with a mask)
"""

import dataclasses

import cv2
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cfbi_jax.compilation import own_settings
from cfbi_jax.data.image_files import ids_in
from cfbi_jax.inference.budget import out_of_memory_explained
from cfbi_jax.inference.programs import Programs
from cfbi_jax.inference.state import Features, State, remember
from cfbi_jax.inference.test_time import View

Label = UInt8[np.ndarray, "height width"]
Probabilities = Float[np.ndarray, "rows height width"]


@dataclasses.dataclass
class Prediction:
    """One frame's label and probabilities, perhaps still being computed, in rows."""

    rows: Array | np.ndarray
    probabilities: Array | None
    given: np.ndarray | None
    ids: tuple[int, ...]  # of rows 1, 2, ...; some may be newer than the probabilities
    with_probabilities: bool

    @own_settings()
    def fetch(self) -> Label | tuple[Label, Probabilities]:
        """Waits for the computation; rows become ids."""
        ids = np.array((0, *self.ids), np.uint8)
        with out_of_memory_explained():
            # As `ids[rows]`, in a quarter of the time.
            label = cv2.LUT(np.asarray(self.rows), np.pad(ids, (0, 256 - len(ids))))
        if not self.with_probabilities:
            return label
        probabilities = np.zeros((len(ids), *label.shape), np.float32)
        if self.probabilities is None:
            probabilities[0] = 1
        else:
            known = min(len(ids), self.probabilities.shape[0])
            probabilities[:known] = np.asarray(self.probabilities)[:known]
        if self.given is not None:
            rows = np.arange(len(ids))[:, None, None]
            probabilities = np.where(self.given > 0, self.given == rows, probabilities)
        return label, probabilities[np.argsort(ids)].astype(np.float32)


class Propagation:
    """One video under way: the network's state and which row holds which id."""

    def __init__(self, programs: Programs, with_probabilities: bool):
        programs.begin_video()
        self._programs = programs
        self._with_probabilities = with_probabilities
        self._views: tuple[View, ...] = ()
        self._size: tuple[int, int] | None = None
        self._state: State | None = None
        self._ids: tuple[int, ...] = ()  # in order of appearance; row 0 is the background
        self.index = 0  # of the next frame

    def background(self, frame: np.ndarray) -> Prediction:
        """A frame before the first mask: there is nothing to look for yet."""
        self._check_frame(frame)
        self.index += 1
        return self._result(np.zeros(self._size, np.uint8), None, None)

    def advance(self, frame: np.ndarray, mask: Label | None) -> Prediction:
        """Dispatches the computation of the next frame and takes it into the state."""
        self._check_frame(frame)
        self._check_mask(mask)
        with self._programs.at_work():
            return self._advance(frame, mask)

    def _advance(self, frame: np.ndarray, mask: Label | None) -> Prediction:
        programs = self._programs
        known = len(self._ids)
        given, ids = (None, self._ids) if mask is None else self._to_rows(mask)
        # A copy, as JAX reads the array later, when a camera may have written over it.
        features = programs.embed(programs.variables, np.array(frame), views=self._views)

        probabilities = None
        if self._state is None or known == 0:  # nothing to predict but background
            rows = programs.to_device(np.zeros(self._size, np.uint8) if given is None else given)
        else:
            num_rows = programs.num_rows(known)
            references = self._state.views[0].reference.shape[0]
            rows, probabilities = programs.predict(
                programs.variables,
                self._state,
                features,
                np.zeros(self._size, np.uint8) if given is None else given,
                np.int32(known),
                views=self._views,
                num_rows=num_rows,
                with_probabilities=self._with_probabilities,
                chunks=programs.budget.chunks(features, self._size, num_rows, references),
            )
        if given is None:
            self._state = remember(self._state, features, rows, self._views, as_reference=False)
        else:
            self._state = self._with_reference(features, rows)
            counts = programs.num_rows(len(ids)), self._state.num_references
            programs.budget.warn(features, self._size, *counts)
        self._ids = ids  # with the state: after an error the frame can be tried again
        self.index += 1
        return self._result(rows, probabilities, given)

    def _with_reference(self, features: Features, rows: Array) -> State:
        """The state with one more reference. Waits, or several copies of the references, for the
        frames under way, would exist at a time."""
        jax.block_until_ready(rows)
        state = remember(self._state, features, rows, self._views, as_reference=True)
        return jax.block_until_ready(state)

    def _result(self, rows, probabilities, given) -> Prediction:
        return Prediction(rows, probabilities, given, self._ids, self._with_probabilities)

    def _check_frame(self, frame: np.ndarray) -> None:
        expected = "uint8 [height, width, 3]"
        if not isinstance(frame, np.ndarray):
            raise ValueError(f"frame {self.index} is {type(frame)}; expected NumPy, {expected}")
        if frame.dtype != np.uint8 or frame.ndim != 3:
            found = f"{frame.dtype} {frame.shape}"
            raise ValueError(f"frame {self.index} is {found}; expected {expected}")
        if frame.shape[2] != 3:
            raise ValueError(f"frame {self.index} has {frame.shape[2]} channels; expected 3, RGB")
        size = frame.shape[:2]
        if self._size is None:
            self._size = size
            self._views = self._programs.views_of(size)
        if size != self._size:
            raise ValueError(
                f"frame {self.index} has {size[0]} x {size[1]} pixels; expected "
                f"{self._size[0]} x {self._size[1]} as before"
            )

    def _check_mask(self, mask: Label | None) -> None:
        if mask is None:
            return
        if mask.shape != self._size:
            raise ValueError(
                f"the mask of frame {self.index} has {mask.shape[0]} x {mask.shape[1]} pixels; "
                f"expected {self._size[0]} x {self._size[1]} as its frame"
            )
        ids = set(ids_in(mask).tolist()) - {0}
        self._programs.options.check_object_count(len(ids | set(self._ids)))
        if self._state is not None:
            self._programs.options.check_reference_count(self._state.num_references + 1)

    def _to_rows(self, mask: Label) -> tuple[Label, tuple[int, ...]]:
        """The mask in rows, and the ids of all rows then: new ids get the next rows."""
        new = [i for i in ids_in(mask).tolist() if i and i not in self._ids]
        ids = (*self._ids, *new)
        table = np.zeros(256, np.uint8)
        table[list(ids)] = np.arange(1, len(ids) + 1)
        return table[mask], ids
