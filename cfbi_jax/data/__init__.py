"""Videos on disk: image files, data-set folders and synthetic videos. Nothing here imports JAX."""
