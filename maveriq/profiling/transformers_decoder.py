"""What `transformers` builds from a configuration: its layers and parameters, without memory for them.

A model is built on torch's meta device, where tensors have shapes but no values. So the layers of any decoder that
`transformers` knows can be compared, and its weights can be written one by one. No code of a model's folder is run.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from maveriq.domain.config_fields import Config
from maveriq.domain.model_features import TEXT_PARTS
from maveriq.errors import InputError, MaveriqError
from maveriq.profiling.layer_names import numbered, prefix_of, split_name

if TYPE_CHECKING:
    import torch

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
                 "torch.int64": "I64", "torch.int32": "I32", "torch.bool": "BOOL", "torch.uint8": "U8"}  # fmt: skip
_NOT_BUILT_WITH = re.compile(r"auto_map|quantization_config|_?attn_implementation\w*|_?experts_implementation\w*|"
                             r"_name_or_path|transformers_version|trust_remote_code|custom_\w+|use_kernels|"
                             r"compression_config|torchscript|device_map")  # fmt: skip
# Attributes of a layer's modules that say where the layer is, how many there are, or what others take from it.
_PLACE = re.compile(
    r"(\w*_)?(idx|index|indices|id|number|num|i|seed)|n_layers?|num_layers|num_hidden_layers|store_full_length_kv"
)
_LISTED, _EXPERTS = re.compile(r".*layers?|.*depth|.*blocks?"), re.compile(r".*experts")
_MAX_INT, _MAX_LISTED, _MAX_MODULES = 2**31, 4_096, 200_000

LayerSignature: TypeAlias = frozenset[str]
"""How a layer is built: the classes of its modules, their settings, and the shapes of its parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    """Normally distributed values."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Uniformly distributed values."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One value everywhere."""

    value: float


Distribution: TypeAlias = Normal | Uniform | Constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A tensor of a checkpoint.

    Args:
        name: its name in the files.
        dtype: its type, as safetensors files name it.
        shape: its sizes.
        layer: the layer that it belongs to; None for what stands beside the layers.
        distribution: how a new model's values are distributed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    distribution: Distribution

    @property
    def count(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltDecoder:
    """A model as `transformers` builds it.

    Args:
        class_name: its class.
        explicit: the decoder's part of the configuration, with all that its class implies.
        layers: how each layer is built.
        layer_paths: the names of the lists of layers, such as model.layers.
        parameters: all tensors of its checkpoint, each once, by the names of the files.
        module_parameters: the names of its parameters in the model itself.
    """

    class_name: str
    explicit: Config
    layers: tuple[LayerSignature, ...]
    layer_paths: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    module_parameters: tuple[str, ...]

    def parameters_of(self, layer: int | None) -> int:
        """Return the number of values of a layer, or with None of what stands beside the layers."""
        return sum(parameter.count for parameter in self.parameters if parameter.layer == layer)


def text_key(config: Config) -> str:
    """Return the key of a multimodal configuration's decoder, "" where the whole is the decoder."""
    return next((key for key in TEXT_PARTS if isinstance(config.get(key), dict) and config[key]), "")


def build_decoder(config: Config, where: str, *, with_weights: bool = False) -> BuiltDecoder:
    """Build a model on the meta device.

    Args:
        config: the parsed `config.json`.
        where: the file's name, for messages.
        with_weights: also tell how a new model's values are distributed; takes a little longer.

    Raises:
        InputError: transformers does not know such a decoder, or refuses the configuration.
        MaveriqError: torch or transformers is not installed.
    """
    _check_sizes(config, where)
    with _quiet():
        model = _model(config, where, initialised=with_weights)
        return _described(model, where)


def _check_sizes(config: Config, where: str) -> None:
    """Refuse numbers for which even a model without values would take long to build."""
    left: list[tuple[str, Any]] = list(config.items())
    most = {_LISTED: 1, _EXPERTS: 1}
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, entry) for entry in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            kind = next((kind for kind in most if kind.fullmatch(key)), None)
            limit = _MAX_INT if kind is None else _MAX_LISTED
            if abs(value) > limit:
                raise InputError(f"{where}: {key} must be at most {limit:,}, not {value}")
            if kind is not None:
                most[kind] = max(most[kind], value)
    if math.prod(most.values()) > _MAX_MODULES:
        raise InputError(
            f"{where}: {most[_LISTED]:,} layers with {most[_EXPERTS]:,} experts are more than any model has; the limit "
            f"is {_MAX_MODULES:,} experts"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says about configurations to itself; what matters is raised."""
    transformers = _import_transformers()
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _import_transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
        import transformers.core_model_loading
        import transformers.initialization
    except ImportError as error:
        raise MaveriqError(
            f"the layers of a model are found with torch and transformers 5.16 or newer ({error.name} is missing): "
            "pip install 'maveriq[torch]'"
        ) from None
    return transformers


def _model(config: Config, where: str, *, initialised: bool) -> Any:
    """Return a model on the meta device. Its parameters have `distribution` where `initialised`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    hf_config = _hf_config(config, where)
    known = [auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if _knows(auto, hf_config)]
    if not known:
        raise InputError(
            f"{where}: transformers has no model that generates text for model_type {hf_config.model_type}"
        )
    dtype = getattr(torch, dtype_of(config, where))
    try:
        with torch.device("meta"), no_init_weights():
            model = known[0].from_config(hf_config, dtype=dtype)
        model.tie_weights()
    except Exception as error:  # whatever the code of a family raises about a configuration that it cannot use
        raise InputError(f"{where}: transformers cannot build it: {_brief(error)}") from None
    recorder = _initialisation_recorder()
    if initialised:
        with contextlib.suppress(Exception), torch.no_grad(), recorder:
            model.initialize_weights()
    model.recorded_initialisation = recorder.seen
    return model


def _hf_config(config: Config, where: str) -> Any:
    """Return transformers' configuration of a parsed file.

    Raises:
        InputError: it does not know the family, or refuses a value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        import transformers

        raise InputError(f"{where}: transformers {transformers.__version__} knows no model_type {str(family)[:60]!r}")
    kind = CONFIG_MAPPING[family]
    if not text_key(config) and "text_config" in kind.sub_configs and f"{family}_text" in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[f"{family}_text"]  # only the decoder of a multimodal family
    try:
        return kind.from_dict(_plain(config))
    except Exception as error:  # as above
        raise InputError(f"{where}: transformers refuses it: {_brief(error)}") from None


def _plain(config: Config) -> dict[str, Any]:
    """Return a configuration without what asks for other code or for quantised modules."""
    return {key: _plain_value(value) for key, value in config.items() if not _NOT_BUILT_WITH.fullmatch(key)}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    # transformers writes an infinite number so, and reads it so from a file alone.
    return float(value["__float__"]) if set(value) == {"__float__"} else _plain(value)


def _knows(auto_model: Any, hf_config: Any) -> bool:
    return type(hf_config) in auto_model._model_mapping  # noqa: SLF001  (no public question for it)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def dtype_of(config: Config, where: str) -> str:
    """Return the type of a checkpoint's weights, bfloat16 where the file names none.

    Raises:
        InputError: it is no type of weights.
    """
    parts = [config, *(config[key] for key in TEXT_PARTS if isinstance(config.get(key), dict))]
    named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "bfloat16")
    name = str(named).removeprefix("torch.")
    if name == "auto":
        return "bfloat16"
    if name not in _DTYPES:
        raise InputError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, not {str(named)[:60]!r}")
    return name


def _described(model: Any, where: str) -> BuiltDecoder:
    """Return what there is to know of a model on the meta device."""
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    lists = _layer_lists(model, layers)
    if not lists or not isinstance(layers, int):
        raise InputError(f"{where}: transformers' {type(model).__name__} has no list of its {layers} layers")
    return BuiltDecoder(
        class_name=type(model).__name__,
        explicit=_config_values(text),
        layers=tuple(
            frozenset().union(*(_signature(place, modules[layer]) for place, modules in enumerate(lists.values())))
            for layer in range(layers)
        ),
        layer_paths=tuple(lists),
        parameters=tuple(_parameters(model, tuple(lists), layers)),
        module_parameters=tuple(model.state_dict()),
    )


def _config_values(text: Any) -> dict[str, Any]:
    values: dict[str, Any] = text.to_dict()
    return values


def _layer_lists(model: Any, layers: int | None) -> dict[str, Any]:
    """Return the lists of modules of the decoder that have an entry for each layer, by their names in the model."""
    import torch

    decoder = model.get_decoder()
    if not any(isinstance(module, torch.nn.ModuleList) for module in decoder.modules()):
        decoder = model  # some call the output matrix their decoder
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    found: dict[str, Any] = {}
    for name, module in decoder.named_modules(prefix=prefix):
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers and not nested:
            found[name] = module
    return found


def _signature(place: int, layer: Any) -> LayerSignature:
    found = set()
    for path, module in layer.named_modules():
        where = f"{place}:{path}"
        found.add(f"{where} is {type(module).__name__}")
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | str) or value is None
            if plain and not name.startswith("_") and name != "training" and not _PLACE.fullmatch(name):
                shown = value if isinstance(value, str) and value.isprintable() else repr(value)
                found.add(f"{where} {name}={shown}")
        for name, parameter in module.named_parameters(recurse=False):
            found.add(f"{where} {name} {tuple(parameter.shape)}")
    return frozenset(found)


def _parameters(model: Any, layer_paths: Sequence[str], layers: int) -> Iterator[Parameter]:
    """Yield the tensors of a model's checkpoint by the names of the files, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(model.named_parameters())
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in every_name}
    drawn = {name: _distribution(name, tensor, model) for name, tensor in tensors.items()}
    stored = revert_weight_conversion(model, tensors)
    numbers = numbered(stored)
    prefixes = {prefix_of(path, numbers, layers) for path in layer_paths}
    for name, tensor in stored.items():
        split = split_name(name)
        yield Parameter(
            name=name,
            dtype=_TORCH_DTYPES[str(tensor.dtype)],
            shape=tuple(tensor.shape),
            layer=split[1] if split and split[0] in prefixes else None,
            distribution=drawn.get(name) or _usual(name, tensor, model),
        )


def _distribution(name: str, tensor: torch.Tensor, model: Any) -> Distribution:
    recorded = model.recorded_initialisation.get(_storage(tensor))
    return recorded if recorded is not None else _usual(name, tensor, model)


def _usual(name: str, tensor: torch.Tensor, model: Any) -> Distribution:
    """Return how values are distributed where the model does not say: matrices normally, norms 1, biases 0."""
    if tensor.dim() > 1:
        spread = getattr(model.config.get_text_config(decoder=True), "initializer_range", None)
        return Normal(mean=0.0, std=spread if isinstance(spread, float) and 0 < spread < 1 else 0.02)
    return Constant(value=0.0 if "bias" in name else 1.0)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  (tells aliases apart where there is no address)


def _initialisation_recorder() -> Any:
    """Return a torch mode that notes how tensors are initialised while it is on."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[misc, unused-ignore]  # torch is not read by mypy
        """Notes the last initialisation of each storage in `seen`."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, Distribution | None] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            del types
            target = args[0] if args else None
            whole = isinstance(target, Tensor) and target.nbytes == target.untyped_storage().nbytes()
            if whole and func._schema.name.endswith("_"):  # noqa: SLF001  (the only place of an operation's name)
                key = _storage(target)
                self.seen[key] = _after(self.seen.get(key), func._schema.name, args[1:])  # noqa: SLF001
            return func(*args, **(kwargs or {}))

    return Recorder()


def _after(before: Distribution | None, operation: str, values: Sequence[Any]) -> Distribution | None:
    """Return how values are distributed after an operation in place; None where that is not known."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    found: Distribution | None = None
    match operation, before:
        case "aten::normal_", _:
            mean, std = (*numbers, *(0.0, 1.0)[len(numbers) :])[:2]
            found = Normal(mean=mean, std=std)
        case "aten::uniform_", _:
            low, high = (*numbers, *(0.0, 1.0)[len(numbers) :])[:2]
            found = Uniform(low=low, high=high)
        case "aten::zero_", _:
            found = Constant(value=0.0)
        case "aten::fill_", _ if len(numbers) == 1:
            found = Constant(value=numbers[0])
        case "aten::erfinv_", Uniform():  # of a truncated normal distribution
            found = Normal(mean=0.0, std=math.sqrt(0.5))
        case "aten::mul_", _ if before is not None and len(numbers) == 1:
            found = _linear(before, factor=numbers[0], shift=0.0)
        case "aten::add_", _ if before is not None and len(numbers) == 1:
            found = _linear(before, factor=1.0, shift=numbers[0])
        case "aten::clamp_", _:
            found = before
    return found


def _linear(before: Distribution, *, factor: float, shift: float) -> Distribution:
    match before:
        case Normal(mean=mean, std=std):
            return Normal(mean=mean * factor + shift, std=std * abs(factor))
        case Uniform(low=low, high=high):
            low, high = sorted((low * factor + shift, high * factor + shift))
            return Uniform(low=low, high=high)
        case Constant(value=value):
            return Constant(value=value * factor + shift)
