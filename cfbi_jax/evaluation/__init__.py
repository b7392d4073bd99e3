"""Masks and ground truth to scores; results to submissions. Imports no JAX."""
