"""Measurements of ranks that communicate, one a file."""
