"""What classifies images, wherever it runs, and what it says. `cbpt_runtime.loading` opens one.

prediction    what is said: `Prediction` of a batch, `Answer` of an image
classifier    `Classifier`: pixels in, a prediction out; called with images of any kind
zero_shot     the maths of a head: cosine logits, probabilities, the alarm between two heads
bundled       both heads of a bundle, in PyTorch
checkpoint    a checkpoint as it is, in PyTorch
detectors     what tells triggered images at test time, to compare the alarm with

A graph is a classifier in `cbpt_runtime.export.classifier`, a server in
`cbpt_runtime.serving.client.classifier`.
"""

from cbpt_runtime.classification.classifier import Classifier
from cbpt_runtime.classification.prediction import Answer, Label, Prediction

__all__ = ["Answer", "Classifier", "Label", "Prediction"]
