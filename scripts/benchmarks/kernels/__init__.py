"""Measurements of the native kernels, one a file."""
