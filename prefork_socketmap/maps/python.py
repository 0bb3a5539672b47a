"""The type ``python``: a function of the user's own code."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence

from prefork_socketmap import settings
from prefork_socketmap.maps.base import CodeError, Map, values_in
from prefork_socketmap.maps.setting import setting
from prefork_socketmap.socketmap.messages import Reply, Status


def _reference(key: str, value: object) -> str:
    """Read ``"module:name"``."""
    module, _, name = settings.text(key, value).partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise settings.wrong(key, value, '"module:name"')
    return f"{module}:{name}"


class PythonMap(Map):
    """Answers with what a function returns: a Reply, a str for OK, None for not found.

    The module is imported when the map is opened, so a worker that starts after a reload runs the code as it is then.
    """

    fold = setting(settings.boolean, False)
    """Off: the function gets the key as the client sent it."""
    function = setting(_reference)
    """``"module:name"`` of the function, which takes the key."""
    setup = setting(_reference, None)
    """``"module:name"`` of a function without arguments that is called once per worker, before the first lookup."""
    path = setting(settings.texts, ())
    """Directories to import from, before all others."""

    takes_any_key = True
    _function: Callable[[str], Reply | str | None]

    def prepare(self) -> None:
        """Import the function and call ``setup``. Raises SettingError if either is not there."""
        # The same directory once, however many maps name it.
        for path in self.path:
            self._require(path)
        for directory in reversed([str(self.base / directory) for directory in self.path]):
            if directory not in sys.path:
                sys.path.insert(0, directory)
        self._function = self._load("function", self.function)
        if self.setup is not None:
            setup = self._load("setup", self.setup)
            try:
                setup()
            except (Exception, SystemExit) as error:
                raise CodeError(f"maps.{self.name}.setup", f"{self.setup} failed: {self._told(error)}") from error

    def find(self, key: str) -> Sequence[str] | None:
        """Return what the function returns for *key*."""
        answer = self._function(key)
        if answer is None:
            return None
        if isinstance(answer, str):
            if answer and not answer.isspace():
                return (answer,)
            answer = Reply(Status.OK, answer)
        if not isinstance(answer, Reply):
            raise TypeError(f"{self.function} returned a {type(answer).__name__}; return a Reply, a str or None")
        return values_in(answer)

    def _require(self, path: str) -> None:
        try:
            (self.base / path).stat()  # an archive, too, is a place to import from
        except OSError as error:
            key = f"maps.{self.name}.path"
            raise settings.SettingError(key, f"{settings.shown(path)}: {error.strerror}") from None

    def _told(self, error: BaseException) -> str:
        """Return what *error* says, and where in the user's code it was raised."""
        text = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
        frames = [each for each in traceback.extract_tb(error.__traceback__) if _is_code(each.filename)]
        own = [each for each in frames if any(each.filename.startswith(f"{self.base / path}/") for path in self.path)]
        if places := own or frames:
            text += f" ({places[-1].filename}, line {places[-1].lineno})"
        return text

    def _load(self, setting: str, reference: str) -> Callable[..., Reply | str | None]:
        module_name, _, name = reference.partition(":")
        key = f"maps.{self.name}.{setting}"
        try:
            found = importlib.import_module(module_name)
            for attribute in name.split("."):
                found = getattr(found, attribute)
        except (ImportError, AttributeError, SyntaxError) as error:
            problem = f"cannot load {settings.shown(reference)}: {self._told(error)}"
            raise settings.SettingError(key, problem) from error
        except (Exception, SystemExit) as error:
            raise CodeError(key, f"cannot load {settings.shown(reference)}: {self._told(error)}") from error
        if not callable(found):
            raise settings.SettingError(key, f"{reference} is not a function")
        return found


def _is_code(file: str) -> bool:
    """Whether *file* of a traceback is somebody's code: neither the import system's nor this file."""
    return file != __file__ and not file.startswith("<") and file != importlib.__file__
