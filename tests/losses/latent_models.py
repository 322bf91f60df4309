"""Small models with latents whose likelihood is known, for the tests of importance-weighted bounds."""

import torch
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from genkernels import ops


class LinearGaussian(nn.Module):
    """z ~ N(0, 1), x ~ N(W z + b, σ), q(z|x) = N(A x + c, diag(s)): ln p(x) and the posterior are Gaussian too.

    ``log_weight`` keeps the noise that it drew, call by call; with `given` it takes that in turn.
    """

    def __init__(self, data=5, latent=3, noise=0.5, seed=0, dtype=torch.float64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder, self.decoder = nn.Linear(data, 2 * latent), nn.Linear(latent, data)
        self.data, self.latent, self.noise = data, latent, noise
        self.drawn, self.given = [], []
        self.to(dtype)

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def weigher(self, x):
        def log_weight(parameters, size, generator, stopped):
            mean, log_scale = parameters
            shape = (len(mean), size, mean.shape[1])
            noise = torch.randn(shape, generator=generator, dtype=mean.dtype)
            if self.given:
                noise = self.given.pop(0)
            self.drawn.append(noise)
            z, ratio = ops.gaussian_reparameterize(noise, mean, log_scale, stopped=stopped)
            means = self.decoder(z)
            return Normal(means, self.noise, validate_args=False).log_prob(x[:, None]).sum(2) + ratio, (z, ratio)

        return log_weight

    def log_prob(self, x):
        """ln p(x), exactly."""
        w, eye = self.decoder.weight, torch.eye(self.data, dtype=x.dtype)
        return MultivariateNormal(self.decoder.bias, w @ w.T + self.noise**2 * eye).log_prob(x)

    def be_exact(self, x):
        """Mean and log-scale of the posterior, of one latent."""
        assert self.latent == 1
        w = self.decoder.weight[:, 0]
        precision = 1 + w.square().sum() / self.noise**2
        mean = (x - self.decoder.bias) @ w / self.noise**2 / precision
        return mean[:, None], (-precision.log() / 2).expand(len(x), 1)


class Switches(nn.Module):
    """Latents of two Bernoulli variables of learned chances, and an x that depends on them."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            nn.init.normal_(self.decoder.weight)
        self.double()

    def log_joint(self, x, z):
        prior = Bernoulli(probs=torch.tensor(0.4, dtype=z.dtype)).log_prob(z).sum(-1)
        return prior + Normal(self.decoder(z), 1.0).log_prob(x).sum(-1)

    def weigher(self, x):
        def log_weight(parameters, size, generator, stopped):
            (logits,) = parameters
            uniform = torch.rand(len(logits), size, 2, generator=generator, dtype=logits.dtype)
            z = (uniform < logits.detach().sigmoid()[:, None]).to(logits.dtype)
            q = Bernoulli(logits=logits[:, None]).log_prob(z).sum(2)
            return self.log_joint(x, z) - q, z

        return log_weight
