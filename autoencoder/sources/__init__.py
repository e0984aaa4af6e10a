"""From what people have on disk to images and captions.

opening: finds out what a path is and gives its source. source: what all sources offer. manifest, entries, tables: JSON
lines and lists, CSV, Parquet. folders: images with or without texts beside them. tar_shards, tar_members: WebDataset.
hub: Hugging Face data sets. captions: texts cleaned. failures: the count of unusable samples. spans: an index of the
lines or members of large files.
"""
