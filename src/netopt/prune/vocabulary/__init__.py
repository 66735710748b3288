"""Tokens that a corpus does not need are removed from a model and from its tokenizer."""

from __future__ import annotations

from netopt.prune.vocabulary.call import VocabularyReport, prune_vocabulary

__all__ = ["VocabularyReport", "prune_vocabulary"]
