"""What tests of the pipeline draw."""

PROMPT = "a picture of noise"


def pixels(pipeline, prompt=PROMPT, seed=1, **settings):
    return pipeline(prompt, seed=seed, output_type="pt", **settings).images


def latents(pipeline, prompt=PROMPT, seed=1, **settings):
    return pipeline(prompt, seed=seed, output_type="latent", **settings).images
