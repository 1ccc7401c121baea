"""The network: the only place that imports torch.distributed. Knows no model and no policy."""
