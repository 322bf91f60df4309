"""Losses, and the draws that belong to them: functions of tensors, one value a sample, in nats."""

from genkernels.losses.logistic_mixture import discretized_logistic_mixture_nll, sample_logistic_mixture

__all__ = ["discretized_logistic_mixture_nll", "sample_logistic_mixture"]
