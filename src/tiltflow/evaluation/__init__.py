"""Scoring of systems, the statistics of their differences, diversity, and the HTML report."""

from tiltflow.evaluation.diversity import cmmd, pairwise_distance, vendi_score
from tiltflow.evaluation.files import read_evaluation, read_scores, write_evaluation, write_scores
from tiltflow.evaluation.report import write_report
from tiltflow.evaluation.scores import (
    Diversity,
    Evaluation,
    System,
    compare,
    evaluate_systems,
)
from tiltflow.evaluation.statistics import (
    Comparison,
    bootstrap_ci,
    holm,
    mean_ci,
    paired_comparison,
    score_ci,
)

__all__ = [
    "Comparison",
    "Diversity",
    "Evaluation",
    "System",
    "bootstrap_ci",
    "cmmd",
    "compare",
    "evaluate_systems",
    "holm",
    "mean_ci",
    "paired_comparison",
    "pairwise_distance",
    "read_evaluation",
    "read_scores",
    "score_ci",
    "vendi_score",
    "write_evaluation",
    "write_report",
    "write_scores",
]
