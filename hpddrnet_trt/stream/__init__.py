"""Live frames in, results out: the runner beside a microscope (see :class:`Stream`)."""

from hpddrnet_trt.stream.records import Policy, StageTimes, State, StreamResult, StreamStatistics
from hpddrnet_trt.stream.stream import Stream
from hpddrnet_trt.stream.worker import LiveSegmenter

__all__ = ["LiveSegmenter", "Policy", "StageTimes", "State", "Stream", "StreamResult", "StreamStatistics"]
