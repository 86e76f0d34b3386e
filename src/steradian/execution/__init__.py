"""Whole steps on a GPU: padded shapes, compiled graphs, recorded graphs."""
