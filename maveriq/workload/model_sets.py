"""Model sets: which models are served, and when each one is requested (TOML, see `traces/README.md`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from maveriq.domain.deployments import Batching, Intent, Objective
from maveriq.domain.models import KvType, ModelSpec, WeightType, config_path, load_model
from maveriq.domain.parallel import ANY_CONFIGURATION, ConfigurationPattern, ParallelConfig, check_layer_split
from maveriq.engine.other_settings import ExclusiveSettings, SglangSettings, TrtllmSettings
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError, UnknownNameError
from maveriq.files import traces_path
from maveriq.tables import read_toml
from maveriq.text import check_name, check_path

_WHAT = "model set"

ContinuousSettings: TypeAlias = VllmSettings | TrtllmSettings | SglangSettings
"""The settings of an engine that batches continuously."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One model of a set: what loads at which bin of 30 s, and how its intent differs from the run's.

    `load_at` 0 is the start of the run, None before it: the model is up when the first request arrives.
    `configuration` is the one to use, None for the policy's choice of those that `pattern` allows. `engine` are the
    settings of its continuous engines, None for exclusive ones. `expected_rps` is how many requests a second it is
    expected to get. `share` is its part, in any unit, of the requests of a workload that does not say which model each
    is for. `replicas` is how many deployments serve it, None for as many as the policy chooses.

    None in `objective`, `min_accuracy`, `float16_only` or an SLO leaves the run's intent as it is. `config` is where
    the model's configuration was read from, None for a model of the catalogue.
    """

    model: ModelSpec
    load_at: int | None = None
    objective: Objective | None = None
    min_accuracy: float | None = None
    float16_only: bool | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    config: Path | None = None
    configuration: ParallelConfig | None = None
    pattern: ConfigurationPattern = ANY_CONFIGURATION
    engine: ContinuousSettings | None = None
    expected_rps: float | None = None
    share: float | None = None
    replicas: int | None = None

    @property
    def batching(self) -> Batching:
        """How its engines batch."""
        return Batching.EXCLUSIVE if self.engine is None else Batching.CONTINUOUS

    def intent(self, of_run: Intent) -> Intent:
        """Return the run's intent with the overrides of this entry.

        Raises:
            InputError: an accuracy outside 0 to 100.
        """
        return replace(
            of_run,
            objective=of_run.objective if self.objective is None else self.objective,
            min_accuracy=of_run.min_accuracy if self.min_accuracy is None else self.min_accuracy,
            float16_only=of_run.float16_only if self.float16_only is None else self.float16_only,
            slo_ttft_s=of_run.slo_ttft_s if self.slo_ttft_s is None else self.slo_ttft_s,
            slo_tpot_s=of_run.slo_tpot_s if self.slo_tpot_s is None else self.slo_tpot_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSet:
    """Models in the order in which they load; the k-th (from 1) is endpoint k.

    Raises:
        InputError: no model, bins that go back, two models of one name, or a name that cannot be used.
    """

    name: str
    entries: tuple[ModelEntry, ...]

    def __post_init__(self) -> None:
        check_name(self.name, _WHAT)
        if not self.entries:
            raise InputError(f"{_WHAT} {self.name!r} has no model")
        for earlier, later in pairwise(self.entries):
            if (later.load_at or 0) < (earlier.load_at or 0):
                raise InputError(
                    f"{_WHAT} {self.name!r}: {later.model.name} loads at bin {later.load_at}, after a model that loads"
                    f" at bin {earlier.load_at}; list the models by load_at"
                )
        seen: dict[str, ModelEntry] = {}
        for entry in self.entries:
            first = seen.setdefault(entry.model.name, entry)
            if (first.model, first.config) != (entry.model, entry.config):
                raise InputError(
                    f"{_WHAT} {self.name!r}: two models are called {entry.model.name}: {_origin(first)} and "
                    f"{_origin(entry)}; set _name_or_path to tell them apart"
                )

    @property
    def load_at(self) -> tuple[int, ...]:
        """The bin at which each model loads, ascending; 0 for one that is up before."""
        return tuple(entry.load_at or 0 for entry in self.entries)

    def weights(self) -> tuple[float, ...] | None:
        """Return how likely each model is beside the others, by `share` or else by `expected_rps`.

        None where neither is given: all are equally likely.

        Raises:
            InputError: one of them is given for some models only.
        """
        name = self.weighted_by()
        if name is None:
            return None
        given = [getattr(entry, name) for entry in self.entries]
        if None in given:
            without = given.index(None)
            raise InputError(
                f"{_WHAT} {self.name!r}: model {without + 1} ({self.entries[without].model.name}) has no {name}, "
                "and others have; give it to all, or to none"
            )
        return tuple(given)

    def weighted_by(self) -> str | None:
        """Return the key by which requests are spread over the models, None where all are equally likely."""
        for name in ("share", "expected_rps"):
            if any(getattr(entry, name) is not None for entry in self.entries):
                return name
        return None

    def configs(self) -> dict[ModelSpec, Path]:
        """Return where each model's own configuration lies; catalogue models have none."""
        return {entry.model: entry.config for entry in self.entries if entry.config is not None}


def _origin(entry: ModelEntry) -> str:
    return "the known one" if entry.config is None else repr(str(entry.config))


_Degree: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1024)]


_Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    model: str
    load_at: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    objective: str | None = None
    min_accuracy: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    float16_only: bool | None = None
    slo_ttft_ms: _Milliseconds | None = None
    slo_tpot_ms: _Milliseconds | None = None
    tp: _Degree | None = None
    pp: _Degree | None = None
    layer_split: list[_Degree] | None = None
    replicas: _Degree | None = None
    weights: str | None = None
    kv: str | None = None
    engine: str | dict[str, Any] | None = None
    expected_rps: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    share: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: str
    models: Annotated[list[_Entry], msgspec.Meta(min_length=1)]
    source: str = ""


def known_model_sets() -> list[str]:
    """Return the names of the model sets that come with maveriq, sorted."""
    return sorted(path.stem for path in traces_path().glob("*.toml") if not path.stem.startswith("cluster-"))


def load_model_set(name_or_path: str) -> ModelSet:
    """Return a model set by its name, or read it from a TOML file.

    Raises:
        UnknownNameError: neither a known name nor a path; a model that is neither.
        InputError: the file is not such a file, or a value in it is wrong.
    """
    known = known_model_sets()
    if name_or_path in known:
        path = traces_path(f"{name_or_path}.toml")
    elif name_or_path.endswith(".toml") or os.sep in name_or_path:
        check_path(name_or_path, _WHAT)
        path = Path(name_or_path)
    else:
        raise UnknownNameError(_WHAT, name_or_path, known, "or give the path of a TOML file")
    file = read_toml(path, _File, what=_WHAT)
    return ModelSet(name=file.name, entries=tuple(_entry(entry, path) for entry in file.models))


def _entry(entry: _Entry, path: Path) -> ModelEntry:
    try:
        config = _config(entry.model, path.parent)
        model = load_model(entry.model if config is None else str(config))
        objective = None if entry.objective is None else _objective(entry.objective)
        engine = _engine(entry)
        configuration = _configuration(entry, model, engine)
        pattern = ANY_CONFIGURATION if configuration else _pattern(entry, engine)
    except InputError as error:
        raise InputError(f"{_WHAT} {str(path)!r}: {error}") from None
    return ModelEntry(
        model=model,
        load_at=entry.load_at,
        objective=objective,
        min_accuracy=entry.min_accuracy,
        float16_only=entry.float16_only,
        slo_ttft_s=None if entry.slo_ttft_ms is None else entry.slo_ttft_ms / 1e3,
        slo_tpot_s=None if entry.slo_tpot_ms is None else entry.slo_tpot_ms / 1e3,
        config=config,
        configuration=configuration,
        pattern=pattern,
        engine=engine,
        expected_rps=entry.expected_rps,
        share=entry.share,
        replicas=entry.replicas,
    )


def _engine(entry: _Entry) -> ContinuousSettings | None:
    settings = None if entry.engine is None else read_engine_settings(entry.engine)
    return None if isinstance(settings, ExclusiveSettings) else settings


def named_configuration(
    model: ModelSpec, engine: ContinuousSettings, *, whole_command: bool
) -> tuple[ParallelConfig | None, ConfigurationPattern]:
    """Return the configuration that an engine's settings name alone, None where the policy chooses, and what they fix.

    Args:
        model: the model.
        engine: the settings.
        whole_command: whether they are a whole command, which also says on how many GPUs the engine runs.

    Raises:
        UnknownNameError: a format that they name is not known.
    """
    entry = _Entry(model=model.name, engine="a command" if whole_command else None)
    configuration = _configuration(entry, model, engine)
    return configuration, ANY_CONFIGURATION if configuration else _pattern(entry, engine)


def _configuration(entry: _Entry, model: ModelSpec, engine: ContinuousSettings | None) -> ParallelConfig | None:
    """Return the configuration that an entry names; None where the policy chooses.

    An exclusive engine's is named by any of its keys, a continuous one's by `tp`, or by the engine's whole command.
    What is left out is one GPU a stage, one stage, and weights and cache as the checkpoint and the engine have them.
    """
    arguments = engine if isinstance(engine, VllmSettings) else VllmSettings()
    if engine is None:
        is_named = any(value is not None for value in (entry.tp, entry.pp, entry.weights, entry.kv))
    else:
        is_named = entry.tp is not None or isinstance(entry.engine, str) or arguments.tensor_parallel_size > 1
    if entry.layer_split is not None and (engine is None or not is_named):
        what = (
            "tp and pp, too" if engine is not None else "the model an engine that batches continuously, or leave it out"
        )
        raise InputError(f"layer_split is of a pipeline that is named; give {what}")
    if not is_named:
        return None
    tp = _agreed("tp", entry.tp, "tensor_parallel_size", arguments.tensor_parallel_size)
    stages = arguments.pipeline_parallel_size
    if entry.layer_split is not None:
        check_layer_split(entry.layer_split, entry.pp or stages, model.layers)
    return ParallelConfig(
        tp=tp,
        pp=_agreed("pp", entry.pp, "pipeline_parallel_size", stages),
        layer_split=tuple(entry.layer_split or ()),
        ep=tp if arguments.enable_expert_parallel else 1,
        weights=_weights(entry.weights or arguments.quantization, model),
        kv=_kv(entry.kv or arguments.kv_cache_dtype),
    )


def _pattern(entry: _Entry, engine: ContinuousSettings | None) -> ConfigurationPattern:
    """Return what an entry fixes of a configuration that the policy chooses."""
    if engine is None:
        return ANY_CONFIGURATION
    arguments = engine if isinstance(engine, VllmSettings) else VllmSettings()
    stages, weights = arguments.pipeline_parallel_size, entry.weights or arguments.quantization
    kv = entry.kv or (None if arguments.kv_cache_dtype == "auto" else arguments.kv_cache_dtype)
    return ConfigurationPattern(
        pp=_agreed("pp", entry.pp, "pipeline_parallel_size", stages) if entry.pp or stages > 1 else None,
        expert_parallel=True if arguments.enable_expert_parallel else None,
        weights=None if weights is None else _named_weights(weights),
        kv=None if kv is None else _kv(kv),
    )


def _agreed(name: str, given: int | None, argument: str, value: int) -> int:
    if given is not None and value not in (1, given):
        raise InputError(f"{name} is {given}, but {argument} of the engine is {value}; give one of them")
    return value if given is None else given


_WEIGHTS = {"float16": "float16", "bfloat16": "float16", "half": "float16", "awq": "int4", "gptq": "int4_gptq"}
_NATIVE_KV = ("auto", "float16", "bfloat16")


def _weights(name: str | None, model: ModelSpec) -> WeightType:
    """Return how weights are stored; by default as a quantised checkpoint stores them, else in 16 bits."""
    if name is None:
        possible = [weights for weights in WeightType if model.why_not_stored_as(weights) is None]
        return possible[0] if possible else WeightType.FLOAT16
    return _named_weights(name)


def _named_weights(name: str) -> WeightType:
    try:
        return WeightType(_WEIGHTS.get(name, name))
    except ValueError:
        raise UnknownNameError("format of weights", name, [*_WEIGHTS, *WeightType]) from None


def _kv(name: str) -> KvType:
    if name in _NATIVE_KV:
        return KvType.NATIVE
    try:
        return KvType("fp8" if name.startswith("fp8") else name)
    except ValueError:
        raise UnknownNameError("format of the KV cache", name, [*_NATIVE_KV, *KvType]) from None


def _config(name_or_path: str, folder: Path) -> Path | None:
    """Return the path of a model's configuration, None for what is a name.

    One named by a relative path lies beside the file that names it.
    """
    if not ("/" in name_or_path or name_or_path.endswith(".json")):
        return None
    return config_path(folder / name_or_path)


def _objective(name: str) -> Objective:
    try:
        return Objective(name.replace("_", "-"))
    except ValueError:
        raise UnknownNameError("objective", name, [objective.value for objective in Objective]) from None
