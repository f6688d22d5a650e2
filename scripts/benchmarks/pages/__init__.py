"""The tables of the documentation's pages, rendered from the records in docs/performance. One page a file."""
