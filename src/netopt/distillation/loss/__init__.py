"""Targets from the teachers, and the losses that compare the student with them."""
