"""The pipeline itself: from a gradient to the average that replaces it."""
