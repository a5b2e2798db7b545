"""Scoring of systems, the statistics of their differences, diversity, and the HTML report."""

from tiltflow.evaluation.diversity import pairwise_distance, vendi_score
from tiltflow.evaluation.report import write_report
from tiltflow.evaluation.scores import (
    Diversity,
    Evaluation,
    System,
    compare,
    evaluate_systems,
    write_evaluation,
)
from tiltflow.evaluation.statistics import (
    Comparison,
    bootstrap_ci,
    holm,
    mean_ci,
    paired_comparison,
)

__all__ = [
    "Comparison",
    "Diversity",
    "Evaluation",
    "System",
    "bootstrap_ci",
    "compare",
    "evaluate_systems",
    "holm",
    "mean_ci",
    "paired_comparison",
    "pairwise_distance",
    "vendi_score",
    "write_evaluation",
    "write_report",
]
