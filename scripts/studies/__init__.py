"""What the studies compute: accuracy by scheme, and the claims of the papers (`papers/`)."""
