"""Suspect models and the data around them: checkpoints, frozen encoders, prompts, images, class lists."""
