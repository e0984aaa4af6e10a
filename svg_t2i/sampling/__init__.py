"""From prompts and images to images, in steps that the pipeline composes.

options: settings and presets. denoising: guided velocity and solver on packed latents. loading: folders and Hub names
to networks. folder: many images into a folder, by several processes.
"""
