"""The catalog of public SEM segmentation sets: where they are, what they permit, how to convert them."""
