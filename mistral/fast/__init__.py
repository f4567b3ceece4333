"""The fast path on a CPU: kernels in C, weights in few bits, a whole decode step in one call.

It plugs in at load: `accelerate` puts other kinds of `Linear` and of `Transformer` in place, and the model
never knows. The plain path stays what it is compared with.
"""
