"""Normalising flows with an exact likelihood."""
