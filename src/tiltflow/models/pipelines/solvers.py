"""Teachers whose pipelines sample with a solver of higher order than Euler's (METHOD §1)."""

from __future__ import annotations

from torch import Tensor

from tiltflow.models.pipelines.backbone import TIMESTEPS
from tiltflow.models.pipelines.directory import Pipeline

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"


def check_solver(pipeline: Pipeline) -> None:
    """Whether the scheduler is a flow's: these solvers are of other diffusions by default.

    Raises:
        ValueError: if it is a solver that is not set to flow matching.
    """
    config = pipeline.json("scheduler/scheduler_config.json")
    wanted = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if config.get("_class_name") in (DPM, UNIPC) and any(
        config.get(key) != value for key, value in wanted.items()
    ):
        raise ValueError(
            f"the scheduler in {pipeline} is no flow's: it needs use_flow_sigmas=true and "
            "prediction_type=flow_prediction"
        )


def network_time(sigma: Tensor) -> Tensor:
    """1000 σ in fp32. The solvers' times are whole numbers: a velocity at such a time t is asked
    for with σ = t/1000 in fp64, because fp32 misses a few of them by a rounding."""
    return (sigma.double() * TIMESTEPS).float()
