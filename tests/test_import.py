"""What `import cfbi_jax` brings along: nothing that training alone needs, which takes seconds."""

import subprocess
import sys

SLOW = {"orbax", "grain", "tensorflow_datasets", "clu", "tensorboardX", "tensorflow", "torch"}


def test_inference_needs_no_package_of_training():
    code = "import sys, cfbi_jax; cfbi_jax.VideoSegmenter; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "cfbi_jax.inference.segmenter" in modules
    assert not SLOW & {name.partition(".")[0] for name in modules}
