"""Parameters and a video in, masks out."""
