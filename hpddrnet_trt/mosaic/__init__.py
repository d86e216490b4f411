"""Mosaics and volumes too large for one picture or one machine: read, segmented and written block by block."""
