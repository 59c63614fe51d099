"""The models that are registered with a service, each with its tokenizer."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from maveriq.domain.models import ModelSpec, known_models, load_model
from maveriq.errors import InputError
from maveriq.serve.errors import ApiError, bad_request, not_found
from maveriq.serve.store import Store, StoredModel
from maveriq.serve.tokenizers import Tokenizer, tokenizer_for


class ModelRegistry:
    """Models by number and by name. A name means one model."""

    def __init__(self, store: Store, *, folder: Path | None, max_models: int) -> None:
        self._store = store
        self._folder = None if folder is None else folder.resolve()
        self._max_models = max_models
        self._by_id: dict[int, StoredModel] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        self._registering = asyncio.Lock()

    def __iter__(self) -> Iterator[StoredModel]:
        return iter(self._by_id.values())

    async def restore(self) -> None:
        """Read what was registered in an earlier life."""
        self._by_id = {model.model_id: model for model in await self._store.models()}

    def by_id(self, model_id: int) -> StoredModel:
        """Return a registered model.

        Raises:
            ApiError: there is none of that number.
        """
        if model_id not in self._by_id:
            raise not_found("model", f"there is no model {model_id}; register it first, or list them with GET /models")
        return self._by_id[model_id]

    def named(self, text: str) -> StoredModel | None:
        """Return the registered model of a name or of a number in digits."""
        if text.isdecimal() and len(text) < 10 and int(text) in self._by_id:
            return self._by_id[int(text)]
        return next((model for model in self._by_id.values() if model.spec.name == text), None)

    async def register(self, text: str) -> StoredModel:
        """Make a model known, by its name in maveriq's catalogue or its place in the models folder.

        One that is known already keeps its number.

        Raises:
            ApiError: no such model, a place outside the folder, another model has the name, too many.
        """
        async with self._registering:
            found = self.named(text)
            if found is not None:
                return found
            spec, folder = self._read(text)
            same_name = self.named(spec.name)
            if same_name is not None:
                if (same_name.spec, same_name.folder) == (spec, folder):
                    return same_name
                told = (
                    f"another model is registered as {spec.name!r}; set _name_or_path in config.json to tell them apart"
                )
                raise ApiError(409, told, code="model_name_taken", param="model")
            if len(self._by_id) >= self._max_models:
                raise ApiError(
                    409, f"{self._max_models} models are registered, which is the maximum", code="too_many_models"
                )
            tokenizer = await asyncio.to_thread(tokenizer_for, folder, spec.vocab_size)
            model = await self._store.add_model(spec, folder)
            self._by_id[model.model_id] = model
            self._tokenizers[model.model_id] = tokenizer
            return model

    async def unregister(self, model_id: int, *, deployed: bool) -> None:
        """Take a model out of the register.

        Raises:
            ApiError: there is none of that number, or it is deployed.
        """
        async with self._registering:
            name = self.by_id(model_id).spec.name
            if deployed:
                raise ApiError(409, f"{name} is deployed; remove its endpoints first", code="model_deployed")
            await self._store.remove_model(model_id)
            del self._by_id[model_id]
            self._tokenizers.pop(model_id, None)

    def tokenizer(self, model: StoredModel) -> Tokenizer:
        """Return a model's tokenizer.

        Raises:
            ApiError: its files have gone or changed since it was registered.
        """
        if model.model_id not in self._tokenizers:
            try:
                self._tokenizers[model.model_id] = tokenizer_for(model.folder, model.spec.vocab_size)
            except InputError as error:
                raise ApiError(503, str(error), code="tokenizer_unusable") from None
        return self._tokenizers[model.model_id]

    def folder_of(self, spec: ModelSpec) -> Path | None:
        """Return where a registered model's files lie, None for one of the catalogue."""
        model = self.named(spec.name)
        return Path(model.folder) if model is not None and model.folder else None

    def _read(self, text: str) -> tuple[ModelSpec, str]:
        """Return a model's shape, and the folder it was read from (empty for one of the catalogue)."""
        if text in known_models():
            return load_model(text), ""
        path = self._inside(text)
        if path is None:
            raise not_found("model", f"unknown model {text!r}{did_you_mean(text, known_models())}{self._how()}")
        try:
            return load_model(str(path)), str(path.parent)
        except InputError as error:
            raise bad_request(str(error), "model") from None

    def _inside(self, text: str) -> Path | None:
        """Return the configuration that a text names, if it lies in the models folder."""
        if self._folder is None or "\0" in text:
            return None
        try:
            path = (self._folder / text).resolve()
            path = path if path.suffix == ".json" else path / "config.json"
            inside = path.resolve().is_relative_to(self._folder)
            return path.resolve() if inside and path.is_file() else None
        except (OSError, RuntimeError):  # too long a name, links in a ring
            return None

    def _how(self) -> str:
        if self._folder is None:
            return " (a server with --models-folder also takes models from there)"
        return " (or give the place of its config.json in the models folder)"


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return a clause with the nearest name, empty if none is near."""
    near = difflib.get_close_matches(text, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
