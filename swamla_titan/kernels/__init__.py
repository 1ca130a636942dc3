"""Fast paths, each beside the plain PyTorch it is tested against."""
