"""Losses, and the draws that belong to them: functions of tensors, one value a sample in nats; those of critics and
generators are means over the batch."""

from genkernels.losses.adversarial import critic_loss, generator_loss
from genkernels.losses.critic_step import critic_step
from genkernels.losses.gradient_penalty import gradient_penalty
from genkernels.losses.logistic_mixture import discretized_logistic_mixture_nll, sample_logistic_mixture

__all__ = [
    "critic_loss",
    "critic_step",
    "discretized_logistic_mixture_nll",
    "generator_loss",
    "gradient_penalty",
    "sample_logistic_mixture",
]
