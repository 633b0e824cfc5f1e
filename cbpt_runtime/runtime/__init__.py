"""What runs inside Triton, and travels in every model repository: numpy and Pillow, nothing else of ours.

preprocess      from an encoded image to the model's pixels, byte for byte as open_clip does it
triton_models   the models of Triton's python backend: decode, classify, count alarms
"""
