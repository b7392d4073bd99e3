"""Videos on disk, videos that are drawn, and the clips to train on. Nothing here imports JAX."""
