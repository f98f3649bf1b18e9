"""The shapes of recipes: which numbers a family of evaluations is made of. The recipes stand in the tasks."""

from __future__ import annotations

from evalsuite.protocols.agents import AgentEngine, AgentProtocol, Arena, Played, PPOProtocol, ProxyProtocol, Reading
from evalsuite.protocols.detection import Detected, DetectionEngine, DetectionProtocol
from evalsuite.protocols.segmentation import SegmentationEngine, SegmentationProtocol, Segmented
from evalsuite.protocols.training import JOBS, Job, Training, job

__all__ = [
    "JOBS",
    "AgentEngine",
    "AgentProtocol",
    "Arena",
    "Detected",
    "DetectionEngine",
    "DetectionProtocol",
    "Job",
    "PPOProtocol",
    "Played",
    "ProxyProtocol",
    "Reading",
    "SegmentationEngine",
    "SegmentationProtocol",
    "Segmented",
    "Training",
    "job",
]
