"""The programs that gpu_check runs on the GPU, each in a process of its own: torch and the standard library suffice."""
