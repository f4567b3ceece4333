"""The same numbers, sooner: kernels in C and whole decode steps on a CPU, captured ones on a GPU.

It plugs in at load: other kinds of `Linear` and of `Transformer` are put in place, and the model never knows. The
plain path stays what all of this is compared with.
"""
