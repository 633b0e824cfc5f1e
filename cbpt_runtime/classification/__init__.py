"""What classifies images, wherever it runs. `cbpt_runtime.loading` opens one; `runtime` has what it says.

classifier  `Classifier`: pixels in, a prediction out; `SecondLook`, which looks again at suspicious images
bundled     both heads of a bundle, in PyTorch
checkpoint  a checkpoint as it is, in PyTorch, and what tells triggered images at test time beside it

A graph is a classifier in `cbpt_runtime.export.classifier`, a server in
`cbpt_runtime.serving.client.classifier`.
"""

from cbpt_runtime.classification.classifier import Classifier
from cbpt_runtime.runtime.prediction import Answer, Label, Prediction

__all__ = ["Answer", "Classifier", "Label", "Prediction"]
