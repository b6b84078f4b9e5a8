"""Multi-task learning: one pretrained transformer, many tasks, and mixtures of LoRA experts between them."""
