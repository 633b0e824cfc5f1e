"""What runs inside Triton: a folder that travels whole in every model repository.

It needs numpy and Pillow and imports nothing else of ours; its imports are relative, as no `cbpt_runtime` is
installed where it goes.

errors          what bad input is told
preprocess      from an encoded image to the model's pixels, byte for byte as open_clip does it
prediction      what a classifier says: of a batch in numbers, of an image in names
zero_shot       the maths of a head: cosine logits, probabilities, the alarm between two heads
second_look     suspicious images again, with a square of them covered
triton_models   the models of Triton's python backend: decode, classify, count alarms, look again
"""
