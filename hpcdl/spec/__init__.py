"""Frozen dataclasses of everything that a user may configure; standard library only, quick to import."""

from hpcdl.spec.cluster import ClusterSpec, PartitionLimits
from hpcdl.spec.compress import OffloadSpec, PeftSpec, PruneSpec, QuantSpec
from hpcdl.spec.data import DataSpec
from hpcdl.spec.experiment import ExperimentSpec, LaunchOptions
from hpcdl.spec.model import MlpShape, ModelShape, ModelSpec
from hpcdl.spec.parallel import ParallelSpec
from hpcdl.spec.train import OptimSpec, TaskSpec, TrainerSpec
from hpcdl.spec.watch import MonitorSpec, PreflightSpec, TrackerSpec

__all__ = [
    "ClusterSpec",
    "DataSpec",
    "ExperimentSpec",
    "LaunchOptions",
    "MlpShape",
    "ModelShape",
    "ModelSpec",
    "MonitorSpec",
    "OffloadSpec",
    "OptimSpec",
    "ParallelSpec",
    "PartitionLimits",
    "PeftSpec",
    "PreflightSpec",
    "PruneSpec",
    "QuantSpec",
    "TaskSpec",
    "TrackerSpec",
    "TrainerSpec",
]
