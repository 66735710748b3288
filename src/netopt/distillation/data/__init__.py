"""Batches, where they come from, and fingerprints of their samples."""
