"""MoE-Fusion: one image from an infrared and a visible one, by mixtures of local and of global experts."""
