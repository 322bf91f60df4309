"""Algorithms over whole networks and over how their layers' weights act."""
