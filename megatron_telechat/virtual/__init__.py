"""Virtual ranks: the accelerator's code path, executed where no accelerator is.

One process plays one rank of a CUDA world of any size. It runs the program itself on tensors that have shapes, types,
devices and strides but no numbers, and writes down what it did: bytes alive, exchanges, kernels, waits of the host.

`launch` starts such processes and collects what they report, `records` is what they report, `match` compares the ranks
of a world; these three need no torch. The others run in a virtual rank only.
"""
