"""What travels through the pipeline: buckets, sparse gradients, copies between devices."""
