"""How pairs look on the network."""
