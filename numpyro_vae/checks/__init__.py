"""Checks, row by row, of whether a posterior can be trusted; one to a file.

`numpyro_vae.checks.base` says what a check is; `numpyro_vae.Posterior.check` runs them.
"""

from numpyro_vae.checks.base import (
    AbstractCheck,
    Finding,
    NotApplicableError,
    RowwiseCheck,
    Subject,
)
from numpyro_vae.checks.calibration import Calibration
from numpyro_vae.checks.collapse import Collapse
from numpyro_vae.checks.gap import Gap
from numpyro_vae.checks.global_sites import Globals
from numpyro_vae.checks.importance import Importance
from numpyro_vae.checks.novelty import Novelty
from numpyro_vae.checks.predictive import Predictive
from numpyro_vae.checks.reference import Reference
from numpyro_vae.checks.report import Report
from numpyro_vae.checks.stored import open_report
from numpyro_vae.inference.psis import khat_threshold, pareto_khat

__all__ = [
    "AbstractCheck",
    "Calibration",
    "Collapse",
    "Finding",
    "Gap",
    "Globals",
    "Importance",
    "NotApplicableError",
    "Novelty",
    "Predictive",
    "Reference",
    "Report",
    "RowwiseCheck",
    "Subject",
    "khat_threshold",
    "open_report",
    "pareto_khat",
]
