"""Shared by both stages: configuration, command lines, files of tensors, processes, stop requests.

config: YAML files and overrides as typed dataclasses; `UserError`. commands: one style of options. weights: tensors
from files, read safely and loaded strictly; files written whole. processes: this process among those of torchrun.
stopping: runs that are asked to end.
"""
