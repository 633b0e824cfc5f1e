"""What runs inside the server. Imports neither torch nor open_clip."""
