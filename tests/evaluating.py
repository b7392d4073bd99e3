"""Evaluations of small videos by a small network: what they begin with and leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cfbi_jax import evaluate

ROOT = Path(__file__).parents[1]
FRAMES, SIZE = 4, (40, 56)


def run(config, workdir):
    return evaluate.run(evaluate.prepare(config, workdir))


def masks_of(folder):
    return {p.relative_to(folder): np.array(Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def times_of(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*.png"))}


def youtube_vos(root, davis, starts, split="valid"):
    """The synthetic DAVIS videos in YouTube-VOS layout, annotated only where an object starts."""
    meta = {}
    folder = root / split
    for name, objects in starts.items():
        shutil.copytree(davis / "JPEGImages/480p" / name, folder / "JPEGImages" / name)
        (folder / "Annotations" / name).mkdir(parents=True)
        stems = [f"{t:05d}" for t in range(FRAMES)]
        for start in set(objects.values()):
            source = Image.open(davis / "Annotations/480p" / name / f"{start:05d}.png")
            label = np.array(source)
            visible = [i for i, first in objects.items() if first == start]
            label[~np.isin(label, visible)] = 0
            image = Image.fromarray(label)
            image.putpalette(source.getpalette())
            image.save(folder / "Annotations" / name / f"{start:05d}.png")
        objects = {
            str(i): {"category": "blob", "frames": stems[start:]} for i, start in objects.items()
        }
        meta[name] = {"objects": objects}
    (folder / "meta.json").write_text(json.dumps({"videos": meta}))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cfbi_jax.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
