"""What `scripts/bench` measures, and how.

`kernels/` holds the measurements of the native kernels, `network/` those of ranks that communicate: one small
file each. `harness/` is what they share: launcher, rank program, test network, records, tables, pictures.
`pages/` renders the tables of the documentation from the records in docs/performance. A new measurement
across ranks is a file in `network/` with `measure(case, rank, size)`, which runs on every rank and yields
records, and `add_arguments` and `run` for the command line.
"""
