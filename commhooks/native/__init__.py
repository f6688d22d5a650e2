"""Native kernels and their references in torch operators. Call them through :mod:`commhooks.native.ops`."""
