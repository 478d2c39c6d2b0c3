"""Linear layers with low-rank adapters: the reference, the fast form and the kernels in C++."""
