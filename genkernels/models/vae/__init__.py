"""Variational autoencoders: latents whose posterior a network approximates, and a bound on the likelihood."""
