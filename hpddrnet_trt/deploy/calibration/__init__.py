"""What calibration sees: crops of micrographs, statistics of activations on them, and ranges from these."""
