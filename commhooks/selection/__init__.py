"""Selectors and density schedules: how many elements of a gradient are sent, and which."""
