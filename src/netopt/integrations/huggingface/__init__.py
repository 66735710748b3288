"""Hugging Face models: their configurations are kept in step with the smaller model, and folders of them shrunk."""

from netopt.integrations.huggingface.config import follow
from netopt.integrations.huggingface.pretrained import shrink_pretrained
from netopt.plan.hooks import register_hook

__all__ = ["shrink_pretrained"]

register_hook("config", follow)
