"""Training of the DiT.

settings: the YAML schema. loop: steps until the run is done, asked to stop or stuck. step: one training step.
optimizer: AdamW, learning rate, exponential moving average. networks: the frozen networks and the first weights.
sharding: DDP, FSDP, activation checkpointing, compilation. monitor: console line, TensorBoard, Weights & Biases.
pictures: samples and metrics during training.
"""
