"""photogram: a server for image and video diffusion models, one fiber per job."""

__version__ = "0.1.0"
