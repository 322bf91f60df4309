"""Generative adversarial networks: a generator learns from a critic that tells its samples from examples."""
