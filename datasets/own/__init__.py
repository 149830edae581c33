"""A user's own data in files: a folder of images, arrays, tables."""
