"""Clips -> parameters."""
