"""The tasks: one file each, a generator of images and of a label per token."""
