"""The parts of TensorRT 8.6's Python module that a build touches, with its names and no others.

Names were read off the real module (bindings 8.6.1 on libraries 8.6.0 import without a GPU, but cannot
build there); numbers are the real ones where bit masks are made of them. What an object is asked for
that the real one lacks is an AttributeError.
"""

from __future__ import annotations

import json
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import onnx
from onnx import numpy_helper

VERSION = "8.6.1"
CONFIG_NAMES = {
    "add_optimization_profile", "avg_timing_iterations", "builder_optimization_level", "clear_flag",
    "create_timing_cache", "engine_capability", "get_flag", "get_memory_pool_limit", "get_preview_feature",
    "get_tactic_sources", "get_timing_cache", "hardware_compatibility_level", "max_aux_streams", "max_workspace_size",
    "num_optimization_profiles", "plugins_to_serialize", "profile_stream", "profiling_verbosity", "reset", "set_flag",
    "set_memory_pool_limit", "set_preview_feature", "set_quantization_flag", "set_tactic_sources", "set_timing_cache",
}  # fmt: skip

BuilderFlag = IntEnum(
    "BuilderFlag",
    "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS "
    "ENABLE_TACTIC_HEURISTIC VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8",
    start=0,
)
TacticSource = IntEnum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS", start=0)
PreviewFeature = IntEnum(
    "PreviewFeature",
    "FASTER_DYNAMIC_SHAPES_0805 DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805 PROFILE_SHARING_0806",
    start=0,
)
MemoryPoolType = IntEnum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM", start=0)
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH EXPLICIT_PRECISION", start=0)
ProfilingVerbosity = IntEnum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE", start=0)
LayerInformationFormat = IntEnum("LayerInformationFormat", "ONELINE JSON", start=0)
DataType = IntEnum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8", start=0)
LayerType = IntEnum(
    "LayerType",
    "CONVOLUTION FULLY_CONNECTED GRID_SAMPLE NMS ACTIVATION POOLING LRN SCALE SOFTMAX DECONVOLUTION CONCATENATION "
    "ELEMENTWISE PLUGIN UNARY PADDING SHUFFLE REDUCE TOPK GATHER MATRIX_MULTIPLY RAGGED_SOFTMAX CONSTANT RNN_V2 "
    "IDENTITY CAST PLUGIN_V2 SLICE SHAPE PARAMETRIC_RELU RESIZE TRIP_LIMIT RECURRENCE ITERATOR LOOP_OUTPUT SELECT "
    "ASSERTION FILL QUANTIZE DEQUANTIZE CONDITION CONDITIONAL_INPUT CONDITIONAL_OUTPUT SCATTER EINSUM ONE_HOT "
    "NON_ZERO REVERSE_SEQUENCE NORMALIZATION",
    start=0,
)
MatrixOperation = IntEnum("MatrixOperation", "NONE TRANSPOSE VECTOR", start=0)


class Config:
    """``IBuilderConfig``: remembers what it is told, if the real one can be told that."""

    def __init__(self) -> None:
        self.__dict__.update(told={}, flags_set=set(), profiles=0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in CONFIG_NAMES:
            raise AttributeError(name)
        self.told[name] = value

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags_set.add(BuilderFlag(flag).name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags_set.discard(BuilderFlag(flag).name)

    def add_optimization_profile(self, profile: Any) -> int:
        self.__dict__["profiles"] += 1
        return int(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, nbytes: int) -> None:
        self.told["workspace"] = nbytes

    def set_tactic_sources(self, sources: int) -> bool:
        self.told["tactics"] = [source.name for source in TacticSource if sources >> source & 1]
        return True

    def set_preview_feature(self, feature: PreviewFeature, on: bool) -> None:
        self.told[PreviewFeature(feature).name] = on


class IConvolutionLayer:
    """A convolution of the parsed file; of other layers a build here only asks the type."""

    type = LayerType.CONVOLUTION
    num_outputs = 1
    num_groups = 1

    def __init__(self, node: onnx.NodeProto, kernel: Any, quantised: bool) -> None:
        self.name, self.kernel, self.num_inputs = node.name, kernel, 2 if quantised else 1
        self.kernel_size_nd = kernel.shape[2:]
        self._node = node

    def get_input(self, slot: int) -> Any:
        return SimpleNamespace(name=self._node.input[slot], shape=(1, self.kernel.shape[1], 8, 8), dtype=DataType.FLOAT)

    def get_output(self, slot: int) -> Any:
        shape = (1, self.kernel.shape[0], 8, 8)
        return SimpleNamespace(name=self._node.output[0], shape=shape, dtype=DataType.FLOAT)


class Network:
    """``INetworkDefinition`` filled by the parser; keeps the file's bytes for the test to look at."""

    num_inputs = 1

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._image = SimpleNamespace(name="image", shape=(-1, 1, -1, -1))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        return self._image


class ParserError:
    """The real one has node numbers only: no ``node_name``, no ``node_operator``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return 7


class Module(SimpleNamespace):
    """The module: what it lacks raises AttributeError. ``seen`` is what the last build was given."""

    def __init__(self, *, layer_types: str = "Half", refuses: str | None = None) -> None:
        self.seen: dict[str, Any] = {}
        self._layer_types, self._refuses = layer_types, refuses
        super().__init__(
            __version__=VERSION, BuilderFlag=BuilderFlag, TacticSource=TacticSource, PreviewFeature=PreviewFeature,
            MemoryPoolType=MemoryPoolType, NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
            ProfilingVerbosity=ProfilingVerbosity, LayerInformationFormat=LayerInformationFormat, DataType=DataType,
            LayerType=LayerType, MatrixOperation=MatrixOperation, IConvolutionLayer=IConvolutionLayer,
            IBuilderConfig=SimpleNamespace(**dict.fromkeys(CONFIG_NAMES)), Builder=self._builder,
            OnnxParser=self._parser, Runtime=self._runtime,
        )  # fmt: skip

    def _builder(self, log: Any) -> Any:
        def create_network(flags: int) -> Network:
            assert flags == 1 << NetworkDefinitionCreationFlag.EXPLICIT_BATCH
            return Network()

        def create_config() -> Config:
            self.seen["config"] = Config()
            return self.seen["config"]

        return SimpleNamespace(
            create_network=create_network, create_builder_config=create_config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda name, low, best, high: None),
            build_serialized_network=lambda network, config: b"plan of TensorRT 8.6",
        )  # fmt: skip

    def _parser(self, network: Network, log: Any) -> Any:
        def parse(path: str) -> bool:
            model = onnx.load(path)
            self.seen["model"] = model
            constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
            makers = {node.output[0]: node for node in model.graph.node}
            for node in model.graph.node:
                if node.op_type == "Conv":
                    source, quantised = node.input[1], node.input[1] not in constants
                    while source not in constants:  # through the pair
                        source = makers[source].input[0]
                    network.layers.append(IConvolutionLayer(node, constants[source], quantised))
            return self._refuses is None

        return SimpleNamespace(
            parse_from_file=parse, num_errors=1, get_error=lambda index: ParserError(str(self._refuses))
        )

    def _runtime(self, log: Any) -> Any:
        layers = [{
            "Name": "conv", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
            "Inputs": [{"Name": "x", "Format/Datatype": f"Row major linear {self._layer_types} format"}],
            "Outputs": [], "Weights": {"Type": self._layer_types, "Count": 8},
        }]  # fmt: skip
        inspector = SimpleNamespace(
            execution_context=None, get_engine_information=lambda kind: json.dumps({"Layers": layers, "Bindings": []})
        )
        context = SimpleNamespace(set_input_shape=lambda name, shape: True)
        engine = SimpleNamespace(
            create_execution_context_without_device_memory=lambda: context,
            create_engine_inspector=lambda: inspector,
        )
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
