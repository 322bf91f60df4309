"""Normalising flows with an exact likelihood."""

from genkernels.models.flows.base import FlowModel
from genkernels.models.flows.glow import Glow
from genkernels.models.flows.maf import IAF, MAF
from genkernels.models.flows.nice import NICE
from genkernels.models.flows.realnvp import RealNVP

__all__ = ["IAF", "MAF", "NICE", "FlowModel", "Glow", "RealNVP"]
