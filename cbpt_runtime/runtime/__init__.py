"""What runs inside Triton: a folder that travels whole in every model repository.

It needs numpy and Pillow and imports nothing else of ours; its imports are relative, as no `cbpt_runtime` is
installed where it goes.

errors          what bad input is told
preprocess      from an encoded image to the model's pixels, byte for byte as open_clip does it
triton_models   the models of Triton's python backend: decode, classify, count alarms
"""
