r"""Variational autoencoders: latents whose posterior a network approximates, and a bound on the likelihood.

They are judged by their bound. Of decoders that rate an image's own grey levels, ``logistic`` and ``gaussian`` (after
dequantisation), it is in bits/dim, and compares with a flow's and a PixelCNN's figure. Of ``bernoulli`` it is in nats,
as the literature has it: it is the probability of binarised images, which are other data than those given, so that bits
for each of their grey levels would compare with nothing; held-out images are binarised by the same draws always. Of
points it is in nats. With one draw it is the ELBO; ``genkernels eval RUN --set importance=5000`` estimates ln p(x) by
5,000, and tells how far to trust that: 1 / Σ w̃² of the normalised weights, and the largest of them.
"""
