"""What every part of both stages may use: configuration, files of tensors, processes, stop requests.

config: YAML files and overrides as typed dataclasses; `UserError`. weights: tensors from files, read safely and loaded
strictly; files written whole. processes: this process among those of torchrun. stopping: runs that are asked to end.
"""
