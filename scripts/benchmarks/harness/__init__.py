"""What all measurements share: launcher, rank program, test network, records, tables, pictures, pages."""
