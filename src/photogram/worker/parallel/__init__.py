"""One model on several devices: the leader runs the pipelines, every rank runs the denoiser's calls, sharded.

`mesh` says who belongs together, `lengths` how long each rank's share of a sequence is, `attention` joins the shares
where tokens meet, `sharding` splits and gathers at the model's edges by diffusers' tables and our own `plans` (both use
diffusers' private parallel interface), `step_cache` makes ranks skip the same steps, `arguments` carries a call's
arguments, `leader` and `follower` are the two kinds of rank.
"""
