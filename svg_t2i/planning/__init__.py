"""What a run will take, before a cluster is booked: an estimate from the configuration alone.

gpus: a table of cards. memory: bytes of a forward and backward pass, on tensors without values. networks: the recipe's,
without values. autoencoder, training, sampling: the plans of stage 1, of stage 2 and of drawing images.
"""
