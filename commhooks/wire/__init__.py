"""The message in which pairs of value and index are sent."""
