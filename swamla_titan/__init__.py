"""SwaMLA-Titan: pretraining for hybrid sliding-window + latent-attention language models."""

__version__ = "0.2.0"
