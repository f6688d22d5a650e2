"""What travels through the pipeline: buckets and sparse gradients; the stream that they are worked on."""
