"""What travels through the pipeline: buckets, sparse gradients, the write-back; the stream that they are worked on."""
