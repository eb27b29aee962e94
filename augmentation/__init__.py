"""Augmentation, inside: programs over whole batches, and the older spellings of Albumentations."""
