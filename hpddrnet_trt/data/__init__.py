"""Micrographs, masks and datasets: reading, checking, simulating, augmenting (no PyTorch here)."""
