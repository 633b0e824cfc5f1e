"""Makes third-party CLIP checkpoints safe to serve."""
