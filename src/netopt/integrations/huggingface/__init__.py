"""Hugging Face models: their configurations are kept in step with the smaller model."""

from netopt.integrations.huggingface.config import follow
from netopt.integrations.huggingface.counts import possible_counts
from netopt.plan.hooks import register_hook

register_hook("configuration", follow, possible_counts)
