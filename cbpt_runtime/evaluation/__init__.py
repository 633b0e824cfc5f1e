"""Clean accuracy, attack success and the alarm of bundles and checkpoints, measured on labelled images.

results       what was measured
subjects      a bundle or a checkpoint as something that names classes
detectors     what tells triggered images at test time, to compare the alarm with
measuring     one pass over the images per subject
tables        Markdown and CSV
"""

from cbpt_runtime.evaluation.measuring import evaluate, evaluate_all
from cbpt_runtime.evaluation.results import AlarmQuality, Evaluation, HeadRates, Measured

__all__ = ["AlarmQuality", "Evaluation", "HeadRates", "Measured", "evaluate", "evaluate_all"]
