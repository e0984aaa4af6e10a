"""What a run will take, before a cluster is booked: an estimate from the configuration alone.

gpus: a table of cards. memory: bytes of a forward and backward pass, on tensors without values. training, sampling: the
plans of a training run of stage 2 and of drawing images.
"""
