"""The models that are registered with a service, each with its tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from maveriq.domain.models import ModelSpec, known_models, load_model
from maveriq.errors import InputError, MaveriqError, did_you_mean
from maveriq.serve.errors import ApiError, bad_request, not_found
from maveriq.serve.store import Store, StoredModel
from maveriq.serve.tokenizer_process import NoTokenizerProcessError, TokenizerLimits, TokenizerPool
from maveriq.serve.tokenizers import Tokenizer, tokenizer_for
from maveriq.text import check_path

_MAX_LOADING = 4  # tokenizers at a time


class ModelRegistry:
    """Registered models by ID and by name. Names are unique."""

    def __init__(
        self, store: Store, *, folder: Path | None, max_models: int, limits: TokenizerLimits | None = None
    ) -> None:
        """Create an empty registry; `restore` fills it from the store.

        Args:
            store: keeps the models across restarts.
            folder: the only folder from which models are read; None allows known models only.
            max_models: registered models at a time.
            limits: of the processes of tokenizers; None for the defaults.
        """
        self._store = store
        self._folder = None if folder is None else folder.resolve()
        self._max_models = max_models
        self._tokenizer_pool = TokenizerPool(limits)
        self._models: dict[int, StoredModel] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        self._changing = asyncio.Lock()
        self._loading = asyncio.Semaphore(_MAX_LOADING)

    def __iter__(self) -> Iterator[StoredModel]:
        return iter(self._models.values())

    async def restore(self) -> None:
        """Read the registered models from the store."""
        self._models = {model.model_id: model for model in await self._store.models()}

    def by_id(self, model_id: int) -> StoredModel:
        """Return a registered model.

        Raises:
            ApiError: there is no model with this ID.
        """
        if model_id not in self._models:
            raise not_found("model", f"there is no model {model_id}; register it first, or list them with GET /models")
        return self._models[model_id]

    def find(self, name: str) -> StoredModel | None:
        """Return the registered model with this name or, in digits, this ID."""
        if name.isdecimal() and len(name) < 10 and int(name) in self._models:
            return self._models[int(name)]
        return next((model for model in self._models.values() if model.spec.name == name), None)

    def folder_of(self, spec: ModelSpec) -> Path | None:
        """Return the folder with a registered model's files, or None if it has none."""
        model = self.find(spec.name)
        return Path(model.folder) if model is not None and model.folder else None

    async def tokenizer(self, model: StoredModel) -> Tokenizer:
        """Return a model's tokenizer.

        Raises:
            NoTokenizerProcessError: no process can be started for it now.
            ApiError: its files are missing or not valid since the model was registered.
        """
        if model.model_id not in self._tokenizers:
            try:
                tokenizer = await tokenizer_for(model.folder, model.spec.vocab_size, self._tokenizer_pool)
            except NoTokenizerProcessError:
                raise
            except MaveriqError as error:
                raise ApiError(503, str(error), code="tokenizer_unusable") from None
            if self._tokenizers.setdefault(model.model_id, tokenizer) is not tokenizer:
                await tokenizer.close()  # another request was faster
        return self._tokenizers[model.model_id]

    def refuse_prompts(self) -> None:
        """Encode no more prompts, and fail those that are being encoded; outputs are still decoded."""
        for tokenizer in self._tokenizers.values():
            tokenizer.refuse_prompts()

    async def close(self) -> None:
        """End the processes of all tokenizers."""
        await asyncio.gather(*(tokenizer.close() for tokenizer in self._tokenizers.values()))

    async def register(self, name: str) -> StoredModel:
        """Register a known model by name, or a model of the models folder by path, and return it.

        A registered model is returned as it is.

        Raises:
            NoTokenizerProcessError: no process can be started for its tokenizer now.
            ApiError: there is no such model, the path leads out of the models folder, another model has the same
                name, or too many models are registered.
        """
        registered = self.find(name)
        if registered is not None:
            return registered
        # Files are read before the lock is taken: a slow disk or a hostile file delays no other registration.
        spec, folder = await asyncio.to_thread(self._load, name)
        known = self._registered_as(spec, folder)
        if known is not None:
            return known
        async with self._loading:
            try:
                tokenizer = await tokenizer_for(folder, spec.vocab_size, self._tokenizer_pool)
            except NoTokenizerProcessError:
                raise
            except MaveriqError as error:
                raise bad_request(str(error), "model") from None
        try:
            async with self._changing:
                known = self._registered_as(spec, folder)
                if known is not None:
                    return known
                model = await self._store.add_model(spec, folder)
                self._models[model.model_id] = model
                self._tokenizers[model.model_id] = tokenizer
                return model
        finally:
            if tokenizer not in self._tokenizers.values():
                await tokenizer.close()

    def _registered_as(self, spec: ModelSpec, folder: str) -> StoredModel | None:
        """Return the registered model that is this one, None if it may be registered.

        Raises:
            ApiError: another model has its name, its name is a number, or too many models are registered.
        """
        if spec.name.isdecimal():
            message = f"model name {spec.name!r} is a number, as IDs are; set another _name_or_path in config.json"
            raise bad_request(message, "model")
        same_name = self.find(spec.name)
        if same_name is not None:
            if (same_name.spec, same_name.folder) == (spec, folder):
                return same_name
            message = f"two models are called {spec.name!r}; set _name_or_path in config.json to tell them apart"
            raise ApiError(409, message, code="model_name_taken", param="model")
        if len(self._models) >= self._max_models:
            message = f"{self._max_models} models are registered, which is the maximum; remove one first"
            raise ApiError(409, message, code="too_many_models")
        return None

    async def unregister(self, model_id: int, *, has_endpoints: bool) -> None:
        """Remove a model from the registry.

        Raises:
            ApiError: there is no model with this ID, or it has endpoints.
        """
        async with self._changing:
            name = self.by_id(model_id).spec.name
            if has_endpoints:
                raise ApiError(409, f"{name} has endpoints; remove them first", code="model_deployed")
            await self._store.remove_model(model_id)
            del self._models[model_id]
            tokenizer = self._tokenizers.pop(model_id, None)
            if tokenizer is not None:
                await tokenizer.close()

    def _load(self, name: str) -> tuple[ModelSpec, str]:
        """Return the spec of a model and the folder of its files (empty for a known model)."""
        try:
            check_path(name, "model")
        except InputError as error:
            raise bad_request(str(error), "model") from None
        if name in known_models():
            return load_model(name), ""
        config = self._config_path(name)
        if config is None:
            if self._folder is None:
                where = " (start the server with --models-folder to use models from a folder)"
            else:
                where = " (or give the path of its config.json in the models folder)"
            raise not_found("model", f"unknown model {name!r}{did_you_mean(name, known_models())}{where}")
        try:
            return load_model(str(config)), str(config.parent)
        except InputError as error:
            raise bad_request(str(error), "model") from None

    def _config_path(self, name: str) -> Path | None:
        """Return the model configuration at a path, or None if it does not exist inside the models folder.

        Links are resolved before the check, so none leads out of the folder.
        """
        if self._folder is None or "\0" in name:
            return None
        try:
            path = (self._folder / name).resolve()
            path = path if path.suffix == ".json" else path / "config.json"
            inside = path.resolve().is_relative_to(self._folder)
            return path.resolve() if inside and path.is_file() else None
        except (OSError, RuntimeError):  # the name is too long, or links form a loop
            return None
