"""The LoRAs of one server: which nicknames are known, which set is active, and what a request gets.

The host holds the active set; the worker is told of each change and merges it. A job carries the set that it was
submitted under, so that no change reaches a running one. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.card import ModelCard
from ..core.config import ServeConfig
from ..core.errors import ConfigError, NotFound, RequestError, ServiceError
from ..core.lora import LoraState
from ..core.request import JSONValue, LoraTarget, LoraUse
from ..engine import Engine
from .active_loras import ActiveLoras, covered, targets_of
from .lora_fields import AskedLora, ChosenLoras, read_loras
from .lora_files import FoundLora, LoraFinder
from .schemas import ActiveLora, KnownLora, LoraListing

DEFAULT_NICKNAME = "default"
"""Of the only LoRA of the command line, as SGLang's clients expect."""
_MAX_ACCEPTED = 4096


class Loras:
    """One per server; lives on the event loop. Changes of the active set come one after the other."""

    def __init__(self, config: ServeConfig, engine: Engine, finder: LoraFinder) -> None:
        self._config = config
        self._engine = engine
        self._finder = finder
        self._known: dict[str, FoundLora] = {}
        self._active = ActiveLoras()
        self._changing = asyncio.Lock()
        self._num_layers: dict[str, Mapping[str, int]] = {}  # of a file, by module
        self._accepted: dict[str, tuple[int, int, int]] = {}  # files that the worker took, as they were then
        self._first: tuple[AskedLora, ...] = ()
        self._begun = asyncio.Event()  # the command line's are set; nothing comes before them
        if not config.lora_path:
            self._begun.set()

    # --- the active set

    async def set(self, asked: Sequence[AskedLora], card: ModelCard) -> str:
        """Load LoRAs and make them the active set of their targets; return a sentence that says what was done.

        Raises RequestError or NotFound naming the parameter, with everything as it was.
        """
        await self._begun.wait()
        return await self._set(asked, card)

    async def _set(self, asked: Sequence[AskedLora], card: ModelCard) -> str:
        _require_support(card)
        found = [await self._find(one) for one in asked]
        uses = self._uses(asked, found)
        targets = targets_of(card)
        async with self._changing:
            # Those for a target that the model lacks are not merged, but they are looked at all the same.
            await self._prepare([use for use in uses if not covered(use.target, targets)], "lora_path")
            await self._change(self._active.with_set(uses, targets), card, "lora_path")
            self._known |= {use.nickname: lora for use, lora in zip(uses, found, strict=True)}
        nicknames = ", ".join(use.nickname for use in uses)
        words = ", ".join(dict.fromkeys(use.target for use in uses))
        strengths = ", ".join(f"{use.strength:.2f}" for use in uses)
        text = f"Successfully set LoRA adapter(s): {nicknames} (target: {words}, strength: {strengths})"
        return ". ".join((text, *self._applied_nowhere(uses, card)))

    async def merge(self, target: LoraTarget, strength: float, card: ModelCard) -> str:
        """Merge what is set, at another strength. Raises RequestError where nothing is."""
        await self._begun.wait()
        _require_support(card)
        words = covered(target, targets_of(card))
        async with self._changing:
            if not any(word in one.strengths for one in self._active.placed for word in words):
                where, param = ("", None) if target == "all" else (f" on '{target}'", "target")
                raise RequestError(f"No LoRA is set{where}; call set_lora first.", param=param, code="no_lora_set")
            await self._change(self._active.with_merged(words, strength), card, "target")
        return f"Successfully merged LoRA weights (target: {target}, strength: {strength})"

    async def unmerge(self, target: LoraTarget, card: ModelCard) -> str:
        """Take out what is merged; it stays set. Nothing to take out is no error."""
        await self._begun.wait()
        _require_support(card)
        async with self._changing:
            await self._change(self._active.without_merged(covered(target, targets_of(card))), card, "target")
        return f"Successfully unmerged LoRA weights (target: {target})"

    async def _change(self, active: ActiveLoras, card: ModelCard, param: str) -> None:
        """Have the worker take over another active set, and keep it once it has."""
        uses = active.uses(targets_of(card))
        # Those that are taken out stay loaded, to be merged again.
        idle = tuple(one.use for one in active.placed if one.strengths)
        try:
            state = await self._engine.set_loras(uses or idle, merged=bool(uses))
        except RequestError as error:
            raise _named(error, param) from None
        self._note(state, (*uses, *idle))
        self._active = active

    def listing(self, card: ModelCard) -> LoraListing:
        """Return the known LoRAs and, module by module, what is set."""
        _require_support(card)
        active = {
            module: [
                ActiveLora(
                    nickname=use.nickname,
                    path=self._known[use.nickname].given,
                    merged=is_merged,
                    strength=use.strength,
                    num_lora_layers_with_weights=self._layers(use, module),
                    mode="merged" if is_merged else "unmerged",
                )
                for use, is_merged in self._active.on_module(module, card)
                if self._layers(use, module)
            ]
            for module in card.lora_modules
        }
        uses = [one.use for one in self._active.placed]
        return LoraListing(
            loaded_adapters=[KnownLora(nickname, lora.given) for nickname, lora in self._known.items()],
            active={module: entries for module, entries in active.items() if entries},
            applied_nowhere=[use.nickname for use in uses if not self._is_applied(use, card)],
        )

    # --- one request

    async def choose(self, fields: Mapping[str, JSONValue], card: ModelCard) -> ChosenLoras:
        """Return what a request for a picture or a clip gets: its own LoRAs where it names any, else the active set.

        They are `loras` and, before them, the one of a model's name ``base:nickname``. Raises RequestError or
        NotFound naming the field, before anything is made.
        """
        await self._begun.wait()
        own = read_loras(fields)
        of_model = await self._of_model(fields.get("model"), card)
        if own is None and of_model is None:
            return ChosenLoras(self._active.uses(targets_of(card)) if card.lora_modules else ())
        asked = (*((of_model,) if of_model is not None else ()), *(own or ()))
        if asked:
            _require_support(card, asked[0].param.partition("[")[0])
        uses = self._uses(asked, [await self._find(one) for one in asked])
        await self._prepare(uses, "loras")
        warnings = tuple(f"{sentence}." for sentence in self._applied_nowhere(uses, card))
        return ChosenLoras(tuple(use for use in uses if covered(use.target, targets_of(card))), warnings)

    async def base_of(self, model: str, card: ModelCard) -> str | None:
        """Return the served name in a model's name ``base:nickname`` of a known LoRA, else None."""
        found, _ = _split(model, card)
        return found if found is not None and await self._of_model(model, card) is not None else None

    async def _of_model(self, model: JSONValue, card: ModelCard) -> AskedLora | None:
        """Read ``base:nickname``. Behind other names than the served one, a colon need not mean a LoRA.

        Raises NotFound for the served name with a nickname that is not known.
        """
        if not isinstance(model, str) or not card.lora_modules:
            return None
        base, nickname = _split(model, card)
        if nickname and nickname in await self.nicknames():
            return AskedLora(nickname=nickname, path=None, param="model", path_param="model")
        if base is not None and nickname:
            raise NotFound(
                f"The model '{model[:200]}' does not exist: no LoRA '{nickname[:200]}' is known.",
                param="model",
                code="model_not_found",
            )
        return None

    async def nicknames(self) -> list[str]:
        """Return what requests may name without a path: what was set, and what lies in the folders now."""
        return list(dict.fromkeys((*self._known, *await asyncio.to_thread(self._finder.names))))

    # --- files

    async def _find(self, one: AskedLora) -> FoundLora:
        if one.path is not None:
            return await asyncio.to_thread(self._finder.find, one.path, one.path_param)
        assert one.nickname is not None
        found = self._known.get(one.nickname) or await asyncio.to_thread(self._finder.named, one.nickname, one.param)
        if found is None:
            raise NotFound(
                f"LoRA '{one.nickname}' is not known; give its path to load it.", param=one.param, code="lora_not_found"
            )
        return found

    def _uses(self, asked: Sequence[AskedLora], found: Sequence[FoundLora]) -> tuple[LoraUse, ...]:
        """Return them under nicknames of which none means two files. Raises RequestError where the request does so."""
        paths: dict[str, str] = {}
        uses: list[LoraUse] = []
        for one, lora in zip(asked, found, strict=True):
            nickname = one.nickname or _nickname_of(lora)
            taken = self._known.get(nickname)
            if one.nickname is None and taken is not None and taken.path != lora.path:
                nickname = lora.given
            if paths.setdefault(nickname, lora.path) != lora.path:
                raise RequestError(f"LoRA '{nickname}' is given two paths.", param=one.path_param)
            uses.append(LoraUse(nickname=nickname, path=lora.path, strength=one.strength, target=one.target))
        return tuple(uses)

    async def _prepare(self, uses: Sequence[LoraUse], param: str) -> None:
        """Have the worker load what it has not accepted yet. Raises RequestError for a file that it refuses."""
        as_they_are = {use.path: await asyncio.to_thread(_signature, use, param) for use in uses}
        if any(self._accepted.get(path) != signature for path, signature in as_they_are.items()):
            try:
                self._note(await self._engine.prepare_loras(tuple(uses)), uses)
            except RequestError as error:
                raise _named(error, param) from None
            while len(self._accepted) > _MAX_ACCEPTED:
                del self._accepted[next(iter(self._accepted))]
            self._accepted |= as_they_are

    def _note(self, state: LoraState, uses: Sequence[LoraUse]) -> None:
        layers = {lora.path: lora.num_layers for lora in state.loaded}
        self._num_layers |= {use.path: layers[use.path] for use in uses if use.path in layers}

    def _layers(self, use: LoraUse, module: str) -> int:
        return self._num_layers.get(use.path, {}).get(module, 0)

    def _is_applied(self, use: LoraUse, card: ModelCard) -> bool:
        only = ActiveLoras().with_set([use], targets_of(card))
        return any(only.on_module(module, card) and self._layers(use, module) for module in card.lora_modules)

    def _applied_nowhere(self, uses: Sequence[LoraUse], card: ModelCard) -> list[str]:
        return [
            f"LoRA '{use.nickname}' is applied nowhere: it has nothing for target '{use.target}' of this model"
            for use in uses
            if not self._is_applied(use, card)
        ]

    # --- the command line's

    async def find_first(self) -> None:
        """Check the files of ``--lora-path``, before the model is loaded. Raises ConfigError."""
        config, finder = self._config, replace(self._finder, allow_local=True, allow_hub=True)
        for number, path in enumerate(config.lora_path):
            try:
                found = await asyncio.to_thread(finder.find, path, "--lora-path")
            except ServiceError as error:
                raise ConfigError(error.message) from None
            usual = DEFAULT_NICKNAME if len(config.lora_path) == 1 else _nickname_of(found)
            nickname = config.lora_nickname[number] if config.lora_nickname else usual
            if nickname in self._known:
                raise ConfigError(f"--lora-nickname '{nickname}': names two LoRAs.")
            self._known[nickname] = found
        scales = config.lora_scale or (1.0,)
        self._first = tuple(
            AskedLora(nickname=nickname, path=None, strength=scale, param="lora_nickname", path_param="lora_path")
            for nickname, scale in zip(self._known, scales * (len(self._known) // len(scales)), strict=True)
        )

    async def set_first(self, card: ModelCard) -> None:
        """Set the LoRAs of the command line. Raises ConfigError where the model cannot take them."""
        try:
            if self._first:
                await self._set(self._first, card)
        except RequestError as error:
            raise ConfigError(f"--lora-path: {error.message}") from None
        finally:
            self._begun.set()


def _require_support(card: ModelCard, param: str | None = None) -> None:
    if not card.lora_modules:
        raise RequestError("LoRA is not enabled for this pipeline.", param=param, code="lora_not_supported")


def _split(model: str, card: ModelCard) -> tuple[str | None, str]:
    """Return the served name and the nickname in ``base:nickname``; no name where another model's stands there."""
    for name in (card.name, card.model_path):
        if model.startswith(f"{name}:"):
            return name, model[len(name) + 1 :]
    return None, "" if model in (card.name, card.model_path) else model.partition(":")[2]


def _nickname_of(found: FoundLora) -> str:
    """What a LoRA is called that was given by its path alone: the file's name, or the hub's id."""
    is_file = found.given.startswith(("/", "~", "."))
    return Path(found.given).stem if is_file else found.given.removesuffix(".safetensors")


def _signature(use: LoraUse, param: str) -> tuple[int, int, int]:
    """What changes when a file does. Raises NotFound when it is gone."""
    try:
        found = os.stat(use.path)
    except OSError:
        raise NotFound(f"The file of LoRA '{use.nickname}' is gone.", param=param, code="lora_not_found") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _named(error: RequestError, param: str) -> RequestError:
    """The worker does not know what its LoRAs are called in a request."""
    return RequestError(error.message, param=param, code=error.code)
