"""Training a CLIP model: a trainable model, and the parts of contrastive training.

Shared by the red team, which implants backdoors, and by defences that tune encoders; neither knows the other.
"""
