"""Sampling: from prompts and images to images, in steps that the pipeline composes.

options: settings and presets. networks: compatibility, device, offload. steps: plan, encode, draw noise, solve, decode.
denoising: guided velocity and solver on packed latents. from_images: the steps that start from images. loading: folders
and Hub names to networks. memory: errors of memory that name the stage. folder: many images into a folder.
"""
