"""Systems as tensors: atoms, edges, batches, and what is prepared for them once."""

from steradian.graph.graph import Edges, Graph, Prediction, batch_graphs

__all__ = ["Edges", "Graph", "Prediction", "batch_graphs"]
