"""Which algorithm is the fastest for a convolution, and how sure that is: predicted or measured."""
