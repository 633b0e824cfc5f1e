"""Clean accuracy, attack success and the alarm of classifiers, measured on labelled images.

metrics       rates with their intervals, and AUROC
results       what was measured
measuring     one pass over the images per classifier
tables        Markdown and CSV
"""

from cbpt_runtime.evaluation.measuring import evaluate, evaluate_all
from cbpt_runtime.evaluation.results import AlarmQuality, Decision, Evaluation, HeadRates, Measured

__all__ = ["AlarmQuality", "Decision", "Evaluation", "HeadRates", "Measured", "evaluate", "evaluate_all"]
