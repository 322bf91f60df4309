"""Losses, and the draws that belong to them: functions of tensors, one value a sample in nats; those of critics and
generators are means over the batch, and importance-weighted bounds come as both."""

from genkernels.losses._estimators import Estimator
from genkernels.losses.adversarial import critic_loss, generator_loss
from genkernels.losses.critic_step import critic_step
from genkernels.losses.gaussian import gaussian_kl
from genkernels.losses.gradient_penalty import gradient_penalty
from genkernels.losses.importance_bound import Bound, ImportanceEstimate, importance_estimate, importance_loss
from genkernels.losses.logistic_mixture import discretized_logistic_mixture_nll, sample_logistic_mixture

__all__ = [
    "Bound",
    "Estimator",
    "ImportanceEstimate",
    "critic_loss",
    "critic_step",
    "discretized_logistic_mixture_nll",
    "gaussian_kl",
    "generator_loss",
    "gradient_penalty",
    "importance_estimate",
    "importance_loss",
    "sample_logistic_mixture",
]
