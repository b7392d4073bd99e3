"""Small data sets on disk, written without the package."""

import json

import numpy as np
import pytest
from PIL import Image


def _write_masks(folder, masks):
    """Grey PNGs 00000.png, ... of `uint8 [time, height, width]`, or of {name: mask}."""
    folder.mkdir(parents=True, exist_ok=True)
    named = masks if isinstance(masks, dict) else {f"{i:05d}": m for i, m in enumerate(masks)}
    for name, mask in named.items():
        Image.fromarray(np.asarray(mask, np.uint8)).save(folder / f"{name}.png")


def _write_frames(folder, names, shape):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", shape[::-1]).save(folder / f"{name}.jpg")


@pytest.fixture
def write_results():
    """write_results(folder, {sequence: masks})."""

    def write(folder, masks):
        for name, own in masks.items():
            _write_masks(folder / name, own)
        return folder

    return write


@pytest.fixture
def write_davis(write_results):
    """write_davis(root, {sequence: masks}, year=2017, split="val"): frames, masks and list."""

    def write(root, masks, year=2017, split="val"):
        write_results(root / "Annotations" / "480p", masks)
        for name, own in masks.items():
            frames = [f"{i:05d}" for i in range(len(own))]
            _write_frames(root / "JPEGImages" / "480p" / name, frames, own[0].shape)
        folder = root / "ImageSets" / str(year)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in masks))
        return root

    return write


@pytest.fixture
def write_youtube_vos(write_results):
    """write_youtube_vos(root, {video: {frame: mask}}, {video: objects of meta.json}, split)."""

    def write(root, masks, objects, split="train"):
        write_results(root / split / "Annotations", masks)
        for name, own in masks.items():
            shape = next(iter(own.values())).shape
            _write_frames(root / split / "JPEGImages" / name, own, shape)
        meta = {"videos": {name: {"objects": own} for name, own in objects.items()}}
        (root / split / "meta.json").write_text(json.dumps(meta))
        return root

    return write
