"""Robust QA: answers found in a text by a transformer with mixtures of experts, also outside its training domains."""
