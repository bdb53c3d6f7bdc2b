"""Evaluation of features: `embed` computes them, `knn` scores them, monitors do both in a run."""
