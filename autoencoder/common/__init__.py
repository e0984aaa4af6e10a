"""Shared by both stages: configuration, command lines, files of tensors, processes, and what runs need to survive.

config: YAML files and overrides as typed dataclasses; `UserError`. commands: one style of options. weights: tensors
from files, read safely and loaded strictly; files written whole. durable: folders, disk space, hashes. processes: this
process among those of torchrun. launch: torchrun with the exit code of its processes. workers: those that read data.
stopping: runs that are asked to end. lock: one run in a folder. watchdog: runs that stand still.
"""
