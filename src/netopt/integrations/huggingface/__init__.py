"""Hugging Face models: their configurations are kept in step with the smaller model, and folders of them shrunk."""

from netopt.integrations.huggingface.config import follow
from netopt.plan.hooks import register_hook

register_hook("config", follow)
