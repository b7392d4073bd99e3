"""What is read and checked before a run, and where it arrives."""

import copy
import dataclasses
import shutil
import zlib

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from runs import error_of

from cfbi_jax.config import default_config, source
from cfbi_jax.models.images import IMAGENET_FORMAT
from cfbi_jax.training import loop, preparation, schedule
from cfbi_jax.training.step import StepOptions
from cfbi_jax.weights.calibration import calibrated
from cfbi_jax.weights.checkpoint import save_checkpoint

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own


def test_a_random_start_is_calibrated(config, tmp_path):
    """From the frames of the first clips; a checkpoint stays as it is."""
    config.init_from = ""
    training = preparation.prepare(config, tmp_path / "out")
    pairs = [training.clips[index].frames[:2] for index in range(16)]
    start = preparation.initial_checkpoint(training.start.model, "", config.seed)
    expected = calibrated(start, np.stack(pairs))
    jax.tree.map(np.testing.assert_array_equal, training.start.variables, expected.variables)
    config.calibrate = False
    plain = preparation.prepare(config, tmp_path / "plain").start
    jax.tree.map(np.testing.assert_array_equal, plain.variables, start.variables)
    save_checkpoint(tmp_path / "saved", plain.model, plain.variables, IMAGENET_FORMAT)
    config.init_from, config.calibrate = str(tmp_path / "saved"), True
    loaded = preparation.prepare(config, tmp_path / "loaded").start
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, start.variables)


def test_a_run_goes_on_without_the_weights_that_it_began_with(config, tmp_path, monkeypatch):
    """With a frozen backbone, too: it is in the checkpoint."""
    config.freeze_backbone = True
    training = preparation.prepare(config, tmp_path / "out")
    image_format = dataclasses.asdict(training.start.image_format)
    begun = {"run": training.plain, "image_format": image_format}
    config.init_from = ""
    with pytest.raises(ValueError, match="the backbone would stay random"):
        preparation.prepare(config, tmp_path / "out")
    monkeypatch.setattr(preparation.checkpoints, "stored_config", lambda _: begun)
    assert preparation.prepare(config, tmp_path / "out").options.freeze_backbone


def test_shared_memory_is_for_all_tasks_of_a_host(config, monkeypatch):
    """Slurm says how many there are on each."""
    config.workers, config.batch_size, config.clips.crop_size = 2, 8, 65
    batch = 65 * 65 * (2 + config.clips.num_current) * 4  # of one clip: each task's part
    needed = (2 * preparation.BATCHES_PER_WORKER + 1) * batch
    free = shutil._ntuple_diskusage(10**9, 0, 4 * needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    preparation._check_shared_memory(config)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,5")
    with pytest.raises(OSError, match="10 worker processes need"):
        preparation._check_shared_memory(config)


def test_a_shared_folder_may_show_its_files_late(tmp_path, monkeypatch):
    """As network file systems do on other hosts."""
    lock = tmp_path / preparation.LOCK
    monkeypatch.setattr(preparation, "from_primary", lambda _: np.uint32(zlib.crc32(b"first")))
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lock.write_bytes(b"first")

    monkeypatch.setattr(preparation.time, "sleep", wait)
    preparation.check_shared(tmp_path)
    assert len(waits) == 3
    lock.write_bytes(b"another")
    with pytest.raises(ValueError, match="not the first process' folder"):
        preparation.check_shared(tmp_path)


def test_half_of_an_odd_number_of_steps(config, tmp_path):
    config.num_train_steps, config.sequential_start, config.mining_end = 7, 0.5, 0.5
    config.mask_errors_start = 0.25
    options = preparation.prepare(config, tmp_path / "out").options
    found = options.sequential_step, options.mining_step, options.mask_errors_step
    assert found == (3.5, 3.5, 1.75)  # masks are predicted from step 4 on


def test_every_field_arrives_where_it_is_used(config, tmp_path, monkeypatch):
    config.weight_decay, config.momentum, config.max_gradient_norm = 0.1, 0.2, 0.3
    config.freeze_backbone, config.remat, config.accumulate = True, "segment", 2
    config.sequential_start, config.mining_end = 0.25, 0.75
    config.mask_errors, config.mask_errors_start = 0.5, 0.625
    config.learning_rate, config.min_learning_rate, config.warmup_steps = 0.4, 0.01, 3
    training = preparation.prepare(config, tmp_path / "out")
    assert training.options == StepOptions(
        max_objects=1,
        sequential_step=2,
        mining_step=6,
        accumulate=2,
        remat="segment",
        ema_decay=0.9,
        freeze_backbone=True,
        mask_errors=0.5,
        mask_errors_step=5,
    )
    assert training.clips.options.crop_size == 33

    class Seen(Exception):
        pass

    def optimizer(rate, *arguments):
        raise Seen(float(rate(0)), float(rate(2)), float(rate(STEPS)), *arguments)

    monkeypatch.setattr(schedule, "optimizer", optimizer)
    with pytest.raises(Seen) as seen:
        loop.run(training)
    first, third, last, *arguments = seen.value.args
    np.testing.assert_allclose([first, third, last], [0.01, 0.4 / 3 * 2, 0.0797], atol=1e-4)
    assert arguments == [0.1, 0.2, 0.3, True, "sgd"]


def test_a_source_of_weight_zero_is_not_used(config, tmp_path):
    config.sources.nowhere = source(root=str(tmp_path / "nowhere"), weight=0)
    clips = preparation.prepare(config, tmp_path / "out").clips
    assert len(clips.sources) == 1 and clips.epoch_length == 1000


def batch_size(config, root):
    config.batch_size, config.accumulate = 3, 2


def no_root(config, root):
    config.sources.davis.root = str(root / "nowhere")


def empty_root(config, root):
    config.sources.davis.root = ""


def unknown_dataset(config, root):
    config.sources.davis.dataset = "kitti"


def sources_of_weight_zero(config, root):
    for one in config.sources.values():
        one.weight = 0


def no_sources(config, root):
    config.sources = ConfigDict()


def no_list(config, root):
    config.sources.davis.split = "trainval"


def no_mask(config, root):
    (root / "Annotations/480p/synthetic-0000/00003.png").unlink()


def no_frame(config, root):
    (root / "JPEGImages/480p/synthetic-0000/00003.jpg").unlink()


def other_size(config, root):
    path = root / "Annotations/480p/synthetic-0000/00002.png"
    Image.open(path).crop((0, 0, 30, 40)).save(path)


def shades(config, root):
    path = root / "Annotations/480p/synthetic-0000/00002.png"
    drawn = Image.fromarray(200 * (np.array(Image.open(path)) > 0).astype(np.uint8))
    drawn.resize((28, 20)).resize((56, 40), Image.BICUBIC).save(path)


def negative_rate(config, root):
    config.learning_rate = -0.1


def rate_that_is_no_number(config, root):
    config.learning_rate = float("nan")


def rate_below_the_smallest(config, root):
    config.learning_rate = 1e-6


def random_frozen_backbone(config, root):
    config.init_from, config.freeze_backbone = "", True


def what_only_an_evaluation_takes(config, root):
    config.checkpoint = "elsewhere"


def dropout_of_all(config, root):
    config.model.dropout = 1.0


def half_precision(config, root):
    config.model.compute_dtype = "float16"


def no_threads(config, root):
    config.threads = 0


def negative_weight(config, root):
    config.sources.davis.weight = -1


def no_windows(config, root):
    config.model.windows = ()


def void_masks(config, root):
    """0 and 255, which in 2017 is nobody's."""
    for path in (root / "Annotations/480p/synthetic-0000").iterdir():
        Image.fromarray(255 * (np.array(Image.open(path)) > 0).astype(np.uint8)).save(path)


def void_masks_beside_others(config, root):
    """The README's own videos: those of the first source alone would train."""
    shutil.copytree(root, root / "own")
    void_masks(config, root / "own")
    config.sources.own = source(root=str(root / "own"), weight=5)


def source_by_hand(config, root):
    config.sources.own = {"datset": "davis", "root": str(root)}


def source_of_text(config, root):
    config.sources.own = "DAVIS"


def no_shared_memory(config, root):
    config.workers = 1_000_000


def list_in_utf16(config, root):
    (root / "ImageSets/2017/train.txt").write_text("synthetic-0000", encoding="utf-16")


def no_gradient(config, root):
    config.max_gradient_norm = 0.0


def endless_momentum(config, root):
    config.momentum = 1.0


def profile_after_the_end(config, root):
    config.profile_at_step = 1 + config.num_train_steps


def no_objects(config, root):
    for path in (root / "Annotations/480p/synthetic-0000").iterdir():
        image = Image.open(path)
        empty = Image.fromarray(np.zeros_like(np.array(image)))
        empty.putpalette(image.getpalette())
        empty.save(path)


def changed_after_preparation(config, root):
    preparation.prepare(config, root.parent / "earlier")
    path = root / "JPEGImages/480p/synthetic-0000/00001.jpg"
    Image.open(path).rotate(180).save(path)


def crop_size(config, root):
    config.clips.crop_size = 32


def unknown_optimizer(config, root):
    config.optimizer = "sdg"


def share_of_steps(config, root):
    config.sequential_start = 50_000.0


def no_weights(config, root):
    config.init_from = str(root / "ckpt")


def other_weights(config, root):
    config.model.resnet_width = 8


def no_scales(config, root):
    config.mode, config.data.root, config.inference.scales = "train_and_eval", str(root), ()


def nothing_to_evaluate(config, root):
    config.mode, config.data.root = "train_and_eval", str(root / "val")


def truth_of_some(config, root):
    """Of the other sequence there is the first mask alone."""
    config.mode, config.data.root = "train_and_eval", str(root)
    (root / "ImageSets/2017/val.txt").write_text("synthetic-0000\nsynthetic-0001\n")
    for path in (root / "Annotations/480p/synthetic-0001").iterdir():
        if path.stem != "00000":
            path.unlink()


def damaged_truth(config, root):
    config.mode, config.data.root = "train_and_eval", str(root)
    path = root / "Annotations/480p/synthetic-0001/00003.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)


def masks_over_the_truth(config, root):
    """The work directory is the data set, whose masks lie in no folder of a resolution."""
    out = root.parent / "out"
    out.symlink_to(root)
    for path in (*root.glob("JPEGImages/480p/*"), *root.glob("Annotations/480p/*")):
        path.rename(path.parents[1] / path.name)
    config.data.resolution = config.sources.davis.resolution = ""
    config.mode, config.data.root = "train_and_eval", str(root)


@pytest.mark.parametrize(
    "spoil, messages",
    [
        (batch_size, ["config.batch_size is 3; expected a multiple of 2 (1 devices x"]),
        (no_root, ["nowhere: no such folder"]),
        (empty_root, ["config.sources.davis.root is empty"]),
        (unknown_dataset, ['dataset is "kitti"; expected one of']),
        (no_sources, ["config.sources is empty, or all weights are 0; expected"]),
        (sources_of_weight_zero, ["config.sources is empty, or all weights are 0; expected"]),
        (no_list, ["trainval.txt: no such list; there are: ", "train.txt"]),
        (no_mask, ["synthetic-0000", "00003.png"]),
        (no_frame, ["synthetic-0000", "00003"]),
        (other_size, ["synthetic-0000/00002.png", "40 x 30", "40 x 56"]),
        (shades, ["synthetic-0000/00002.png", "anti-aliased"]),
        (negative_rate, ["config.learning_rate is -0.1; expected 0 or more"]),
        (rate_that_is_no_number, ["config.learning_rate is nan; expected 0 or more"]),
        (
            rate_below_the_smallest,
            ["config.learning_rate is 1e-06, and", "min_learning_rate 1e-05"],
        ),
        (random_frozen_backbone, ["config.freeze_backbone is True and config.init_from is empty"]),
        (what_only_an_evaluation_takes, ["config.checkpoint is 'elsewhere'", "config.init_from"]),
        (dropout_of_all, ["dropout is 1.0; expected 0 or more, below 1"]),
        (half_precision, ["compute_dtype is float16, in which gradients vanish"]),
        (no_windows, ["windows is (); expected 1 or more"]),
        (no_threads, ["config.threads is 0; expected 1 or more"]),
        (negative_weight, ["config.sources.davis.weight is -1; expected 0 or more"]),
        (void_masks, ["config.sources.davis: none of 4 clips", "set year=2016"]),
        (void_masks_beside_others, ["config.sources.own: none of 4 clips", "set year=2016"]),
        (
            source_by_hand,
            ["config.sources.own: ", "datset", "expected cfbi_jax.config.source(...)"],
        ),
        (source_of_text, ["config.sources.own: ", "expected cfbi_jax.config.source(...)"]),
        (no_shared_memory, ["/dev/shm (shared memory)", "1000000 worker", "--config.workers=0"]),
        (list_in_utf16, ["train.txt", "expected a list in UTF-8"]),
        (no_gradient, ["config.max_gradient_norm is 0.0; expected more than 0"]),
        (endless_momentum, ["config.momentum is 1.0; expected 0 or more, below 1"]),
        (profile_after_the_end, ["config.profile_at_step is 9, and", "expected a step of the run"]),
        (no_objects, ["none of 4 clips shows an object", "expected masks with"]),
        (changed_after_preparation, ["synthetic-0000/00001.jpg", "records"]),
        (crop_size, ["crop_size = 32; expected 16 n + 1"]),
        (unknown_optimizer, ['config.optimizer is "sdg"; expected one of', "adam"]),
        (share_of_steps, ["config.sequential_start is 50000.0; expected a share"]),
        (no_weights, ["ckpt: no such file or folder", "config.init_from"]),
        (other_weights, ["resnet_width is 4 there, config.model.resnet_width 8"]),
        (nothing_to_evaluate, ["val: no such folder"]),
        (truth_of_some, ["1 of the 2 videos", "no true masks but the first: synthetic-0001"]),
        (damaged_truth, ["synthetic-0001/00003.png: damaged picture"]),
        (masks_over_the_truth, ["Annotations/synthetic-0001 are where masks would be written"]),
    ],
)
def test_bad_input_is_found_before_the_first_step(
    from_davis, tmp_path, monkeypatch, spoil, messages
):
    config, root = from_davis
    spoil(config, root)
    text = error_of(config, tmp_path / "out", monkeypatch)
    for message in messages:
        assert message in text
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("spoil", [no_weights, nothing_to_evaluate, no_scales])
def test_what_is_soon_seen_is_looked_at_before_the_videos_are_copied(
    from_davis, tmp_path, monkeypatch, spoil
):
    config, root = from_davis
    spoil(config, root)
    assert error_of(config, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "records").exists()


def test_a_source_by_hand_has_defaults(from_davis, tmp_path):
    config, root = from_davis
    config.sources.davis = {"root": str(root), "weight": 3}
    clips = preparation.prepare(config, tmp_path / "out").clips
    assert clips.epoch_length == 3 * len(clips.sources[0])


def test_a_batch_that_does_not_divide_by_the_devices(config, tmp_path, monkeypatch):
    config.batch_size = 3
    two = jax.local_devices() * 2
    monkeypatch.setattr(jax, "devices", lambda: two)
    text = error_of(config, tmp_path / "out", monkeypatch)
    assert "config.batch_size is 3; expected a multiple of 2 (2 devices x" in text


def test_a_field_that_is_newer_than_the_run_has_its_default(tmp_path):
    now = default_config().to_dict() | {"sources": {"davis": source().to_dict()}}
    begun = copy.deepcopy(now)
    del begun["clips"]["colour_jitter"], begun["sources"]["davis"]["paste"]
    preparation._check_unchanged(begun, now, tmp_path)
    now["clips"]["colour_jitter"], now["sources"]["davis"]["paste"] = 0.3, 0.5
    different = "colour_jitter: 0.0 in the checkpoint, 0.3 now\n.*paste: 0.0 in the checkpoint, 0.5"
    with pytest.raises(ValueError, match=different):
        preparation._check_unchanged(begun, now, tmp_path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("seed", -1, "config.seed is -1; expected 0 or more"),
        ("seed", 2**32, "config.seed is 4294967296; expected less than 2**32"),
        ("weight_decay", float("inf"), "config.weight_decay is inf; expected 0 or more"),
        ("log_every_steps", -1, "config.log_every_steps is -1; expected 0 or more"),
        ("keep_checkpoints", 0, "config.keep_checkpoints is 0; expected 1 or more"),
        ("mining_end", 1.5, "config.mining_end is 1.5; expected a share of all steps"),
        ("max_gradient_norm", float("nan"), "config.max_gradient_norm is nan; expected more"),
        ("momentum", -0.1, "config.momentum is -0.1; expected 0 or more, below 1"),
    ],
)
def test_numbers_out_of_their_range(config, tmp_path, field, value, message):
    config[field] = value
    with pytest.raises(ValueError) as error:
        preparation.prepare(config, tmp_path / "out")
    assert str(error.value).startswith(message)
