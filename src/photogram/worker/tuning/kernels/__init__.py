"""Chains of small operations between a transformer's matrix products, each as one pass over memory.

`reference.py` says in plain torch what each chain computes, and computes it on a CPU; `norm.py`, `rope.py`,
`activation.py` and `quantize.py` are the same in Triton. All arithmetic is in fp32 and every result is rounded once,
where the chains they stand for round at each of their steps: against fp32 the error is no larger.
"""
