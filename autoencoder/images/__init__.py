"""From files to images: decoding, crops, data sources, and the order in which samples are visited.

files: one image file as RGB, aspect buckets, crops, grids. manifest: image–caption lists and folders as a source of
samples. tar_shards: the same for WebDataset tars. spans: an index of the lines or members of large files. order: the
seeded, resumable order of training samples.
"""
