"""The claims of the five papers, one figure each; `scripts/reproduce` runs them."""
