"""J and F written straight from their definition: whole images, one object at a time, no shortcuts.

Shares no code with `cfbi_jax.evaluation`, so that agreement means something.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage


def boundary(mask):
    """The border rule as one comparison: repeated edges differ from nothing."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    neighbours = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.logical_or.reduce([mask != neighbour for neighbour in neighbours])


def dilate(mask, radius):
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return ndimage.binary_dilation(mask, structure=y * y + x * x <= radius * radius)


def j_and_f(prediction, truth):
    """J and F of two bool masks."""
    intersection, union = (prediction & truth).sum(), (prediction | truth).sum()
    j = 1.0 if union == 0 else intersection / union

    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    ours, theirs = boundary(prediction), boundary(truth)
    if not ours.any() and not theirs.any():
        return j, 1.0
    if not ours.any() or not theirs.any():
        return j, 0.0
    precision = (ours & dilate(theirs, radius)).sum() / ours.sum()
    recall = (theirs & dilate(ours, radius)).sum() / theirs.sum()
    return j, 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def statistics(values):
    """Mean, recall and decay, with whole-number arithmetic for the borders of the quarters."""
    n = len(values)
    # round(1 + (n - 1) i / 4 + 1e-10) - 1: the small number rounds halves up.
    borders = [(2 * (4 + (n - 1) * i) + 4) // 8 - 1 for i in range(5)]
    first = [values[i] for i in range(borders[0], borders[1] + 1)]
    last = [values[i] for i in range(borders[3], borders[4] + 1)]
    recall = sum(value > 0.5 for value in values) / n
    return sum(values) / n, recall, sum(first) / len(first) - sum(last) / len(last)


def davis(root, results, year, split, resolution):
    """{(sequence, id): (J per frame, F per frame)} of a DAVIS folder."""
    scores = {}
    for name in (Path(root) / "ImageSets" / str(year) / f"{split}.txt").read_text().split():
        paths = sorted((Path(root) / "Annotations" / resolution / name).glob("*.png"))
        truth = [np.array(Image.open(path)).astype(int) for path in paths]
        predicted = [
            np.array(Image.open(Path(results) / name / path.name)).astype(int)
            for path in paths[1:-1]
        ]
        if year == 2016:
            truth, predicted = ([(m > 0) * 1 for m in masks] for masks in (truth, predicted))
        num_objects = truth[0][truth[0] != 255].max()
        for k in range(1, num_objects + 1):
            pairs = [j_and_f(p == k, t == k) for p, t in zip(predicted, truth[1:-1], strict=True)]
            scores[name, k] = tuple(zip(*pairs, strict=True))
    return scores
