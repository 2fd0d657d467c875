"""Trains and scores the models that ship with photogram: drawn scenes in, diffusers folders out."""
