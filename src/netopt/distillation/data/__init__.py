"""Batches, the samples they are made of, and what a teacher said of them."""
