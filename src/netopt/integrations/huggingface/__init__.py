"""Configurations of Hugging Face models, kept in step with the model."""
