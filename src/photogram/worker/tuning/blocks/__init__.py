"""Families' blocks over the chains in `kernels`: subclasses of diffusers' own, which take their place in a network.

Each has the parameters, the submodules and the maths of the class it stands for, and calls every linear layer as such,
so that LoRAs reach it. A call with anything that the fast form does not know (an adapter, a modulation of each token, a
cache) is left to diffusers' own code.
"""
