"""From what people have on disk to images and captions, in the order in which samples are visited.

files, colours: one image file as RGB, aspect buckets, crops, grids. opening: finds out what a path is and gives its
source. sources: what all sources offer. manifest, entries, tables: JSON lines and lists, CSV, Parquet. folders: images
with or without texts beside them. tar_shards, tar_members: WebDataset. hub: Hugging Face data sets. captions: texts
cleaned. failures: the count of unusable samples. spans: an index of the lines or members of large files. order: the
seeded, resumable order of training samples.
"""
