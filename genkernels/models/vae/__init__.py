r"""Variational autoencoders: latents whose posterior a network approximates, and a bound on the likelihood.

They are judged by their bound. Of decoders that rate an image's own grey levels, ``logistic`` and ``gaussian`` (after
dequantisation), it is in bits/dim, and compares with a flow's and a PixelCNN's figure. Of ``bernoulli`` it is in nats,
as the literature has it: it is the probability of binarised images, which are other data than those given, so that bits
for each of their grey levels would compare with nothing; held-out images are binarised by the same draws always. Of
points it is in nats. With one draw it is the ELBO; ``genkernels eval RUN --set importance=5000`` estimates ln p(x) by
5,000, and tells how far to trust that: 1 / Σ w̃² of the normalised weights, and the largest of them.

What the preset ``digits`` reaches on the 8×8 digits (``genkernels train MODEL --data digits --max-steps 2000``, batches
of 64, averaged weights), over the 360 held-out images, torch 2.13 on one thread of a CPU; the bound that the model
maximises, then −ln p(x) by 5,000 draws; mean and standard deviation over seeds 0, 1 and 2, or seed 0 alone. Over the
images, the same ones always, the standard error is another 0.013 bits/dim, or 0.18 nats:

- ``vae``: 1.936 ± 0.003 bits/dim, by 5,000 draws 1.870 ± 0.004;
- ``vae --set posterior=planar`` (seed 0, where the Gaussian has 1.934 and 1.871): 1.932, 1.868;
- ``vae --set posterior=radial`` (seed 0): 1.933, 1.870;
- ``vae --set posterior=iaf`` (seed 0): 1.918, 1.860;
- ``iwae --set importance=5``: 1.897 ± 0.005, 1.850 ± 0.004;
- ``iwae`` (k = 50; seed 0): 1.869, 1.838;
- ``vae --set likelihood=bernoulli``: 23.10 ± 0.12 nats, 22.94 ± 0.01;
- ``iwae --set likelihood=bernoulli --set importance=5``: 22.88 ± 0.02 nats, 22.66 ± 0.01;
- ``hierarchicalvae``: 1.892 ± 0.022 by the bound; ``pixelvae``: 1.783 ± 0.014; ``avade``, a Gaussian of dequantised
  images behind a flow: 2.762 ± 0.021.

Of 5,000 draws 72 to 81 count (1 / Σ w̃²) where the VAE's posterior is Gaussian and its likelihood logistic, 140 where
it is IAF, 21 for IWAE at k = 50, more than 1,300 with binarised images: an estimate by few is still a little below ln
p(x).

What the parts of ``avade`` bring, on the same digits (``genkernels table avade``: 3,000 steps, seed 0; bits/dim by the
bound, Fréchet distance on a digit classifier's features), beside Lucas et al.'s on CIFAR-10 with far larger networks:

- ``gan``, the critic alone: no bound, 21.0; there 31.4;
- ``vae``, the likelihood alone: 2.90 and 54.4; there 4.4 and 171;
- ``v-ade``, likelihood and flow: 2.59 and 23.5; there 3.5 and 112;
- ``av-gde``, likelihood and critic: 2.97 and 20.1; there 4.4 and 58.6;
- ``av-ade``, all three: 2.72 and 5.9; there 3.9 and 28.0.

Both orders are the paper's, but that ``gan`` and ``av-gde``, one seed each, change places in the second: the flow
lowers the bound, and a critic beside it costs some of that and more than makes up for it in the samples.
"""
