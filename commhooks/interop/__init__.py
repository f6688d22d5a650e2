"""Top-k selection and sparse merging for arrays of other libraries."""
