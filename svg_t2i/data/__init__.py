"""Training data: image–caption sources to batches.

sources: samples with crop and caption. draws: randomness of one visit to a sample. batching: how a step's samples are
split into micro-batches. loader: batches of a step, on any number of processes and workers. feature_cache: features
computed once, as a source. inspection: what a source holds. settings: the data section of the YAML file.
"""
