"""Reward modelling: a double-layer mixture of LoRA experts that scores answers to prompts (DMoERM)."""
