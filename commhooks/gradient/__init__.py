"""The data of the pipeline, buckets and sparse gradients, and the CUDA stream on which they are processed."""
