"""The torch executor's steps on a GPU: kernels, CUDA graphs, sampling, and the loop that keeps the device busy."""
