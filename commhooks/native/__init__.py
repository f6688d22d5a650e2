"""Native kernels with their pure-torch references: call them through :mod:`commhooks.native.ops`."""
