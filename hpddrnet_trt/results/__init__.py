"""Segmentations as files that other programs read: one module per kind of file.

All writers take the labels (uint8 ``[H, W]``), the classes, ``pixel_size_m`` (metres, None when unknown: then no file
states a scale) and ``provenance`` (JSON-able), and write whole files or folders or none.
"""
