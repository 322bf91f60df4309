"""Generative adversarial networks: a generator learns from a critic that tells its samples from examples.

Quality is measured without a likelihood, by the sliced Wasserstein distance between samples and held-out examples. What
the presets reach on eight Gaussians on a circle (``genkernels train MODEL --data eight_gaussians --max-steps STEPS``,
batches of 64, averaged weights), mean and standard deviation over seeds 0, 1 and 2, torch 2.13 on one thread of a CPU:

- ``wgangp``, 5,000 steps: eight of eight modes, 97.2 ± 0.1 % of the samples in one, distance 0.045 ± 0.005;
- ``sngan``, 5,000 steps: eight of eight, 95.4 ± 0.2 %, 0.051 ± 0.004;
- ``r3gan``, 2,000 steps: eight of eight, 98.4 ± 0.3 %, 0.064 ± 0.006;
- ``bigan``, 1,500 steps: eight of eight, 95.6 ± 1.8 %, 0.062 ± 0.007, the mean square of x − G(E(x)) falls from 1.00 to
  0.026 ± 0.003;
- ``wgan``, 20,000 steps: eight of eight, 78 ± 10 %, 0.12 ± 0.06, and still falling;
- ``gan``, 5,000 steps: one seed finds eight of eight, 98.0 % and 0.052; with two the generator goes round, one or two
  modes at a time, and its averaged weights give the middle of the circle: none, and 0.97. A penalty r1 = 0.1 did not
  cure these in as many steps. It is the original's known fault, on the reference as on the kernels;
- as many other examples: eight of eight, 99.0 ± 0.1 %, 0.038 ± 0.010.

A sample is in a mode within three standard deviations of its centre. The step sizes of ``ring2d``, and the weight of
WGAN-GP's penalty there, were chosen on seed 0 and the same held-out points: at the paper's own WGAN-GP had found five
modes after 4,000 steps.

On the 8×8 digits the distance to the 360 held-out images after a few minutes (samples of the first two look like
digits, those of ``r3gan`` are rougher, some of them on a grey ground):

- ``wgangp``, 1,000 steps: 0.049 ± 0.004;
- ``sngan``, 800 steps: 0.073 ± 0.012;
- ``r3gan``, 900 steps: 0.090 ± 0.008, and still falling;
- ``gan``, 1,000 steps: 0.054 ± 0.008; ``wgan``, 1,000 steps: 0.136 ± 0.009, and still falling;
- as many other images: 0.044 ± 0.007; uniform noise: 0.35.

``cyclegan`` on crops of two photographs (``--data two_photos32 --set width=16 --max-steps 5000``, batches of 1 as its
paper's): the cycle's mean error, of pixels in [0, 1], falls on held-out images from 0.248 ± 0.001 after 500 steps to
0.180 ± 0.018, the distance from 0.262 ± 0.011 to 0.207 ± 0.032. What it translates takes on the other photograph's
ground and its colours; the rarer things there, petals and leaves, it does not draw, and transposed convolutions leave
their checkerboard.

**How much faster a step can be.** A pass is one batch through the critic, forward, back by its inputs or back by its
weights. A critic's loss takes three passes for each of its two batches. Beside it WGAN-GP's penalty takes six by double
backward and four here, so that the critic's step falls from 12 to 10; R1 and R2 take it from 12 to 8, as four passes
serve loss and penalty of a batch. The generator's passes stay. That bounds what arithmetic can save of a whole step, as
``genkernels bench training_step`` has it: the ratio of the floating-point operations of both ways comes first. Behind
it stands what was measured, the ratio of the medians of processor time, from interleaved steps of both in one process,
one thread of a CPU that others used too, fp32, torch 2.13:

- ``wgangp``: points 1.17, measured 1.07; digits 1.17, measured 1.17; photos32 1.17, measured 1.26;
- ``r3gan``: points 1.26, measured 1.15; digits 1.19, measured 1.48; photos32 1.15, measured 1.77;
- ``sngan``: 1.00 for all, measured 1.86, 1.15 and 1.11;
- ``gan``, ``wgan``: 1.00, measured 1.05 and 1.09 on points; the same as the reference on images, as are ``bigan`` and
  ``cyclegan`` anywhere.

What is beyond the ratio of operations comes from fewer passes over memory (R3GAN's filters in one pass, spectral norms
of all layers in one call) and, on points, from fewer calls.
"""
