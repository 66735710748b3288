"""Hugging Face models: their configurations are kept in step with the smaller model, and folders of them shrunk."""

from netopt.integrations.huggingface.config import follow
from netopt.integrations.huggingface.counts import possible_counts
from netopt.integrations.huggingface.depth import counted, what_it_builds
from netopt.integrations.huggingface.experts import counted_experts
from netopt.plan.blocks import register_depth_hook
from netopt.plan.experts import register_expert_hook
from netopt.plan.hooks import register_hook

register_hook("configuration", follow, possible_counts)
register_depth_hook("configuration", (counted, what_it_builds))
register_expert_hook("configuration", counted_experts)
