"""Which places of a gradient are sent."""
