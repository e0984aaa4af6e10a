"""Evaluation of autoencoders: metrics, one pass over many images, reports.

metrics: PSNR, SSIM, LPIPS, Fréchet distance. crops: images cropped to several resolutions, in batches that do not
depend on the number of processes. reconstruction: all metrics of one autoencoder. latent_statistics: mean and deviation
of its latents over many images.
"""
