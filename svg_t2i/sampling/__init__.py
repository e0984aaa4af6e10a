"""Sampling: from prompts and images to images, in steps that the pipeline composes.

options: settings and presets. networks: what belongs together, and the stages of a call. conditioning: the texts.
steps: plan, encode images, draw noise, solve, decode. denoising: guided velocity and solver on packed latents.
schedulers: those of diffusers as solvers. inputs: images and masks as they are given. from_images: the steps that start
from images. memory: errors of memory that name the stage.
"""
