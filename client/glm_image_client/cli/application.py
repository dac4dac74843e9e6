"""The application ``glm-image``: its root, and how its commands are added and end."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from glm_image_client._version import __version__
from glm_image_client.cli.exits import EXIT_INTERRUPTED, exit_code_of, print_error, print_usage_error
from glm_image_client.cli.flags import with_flags
from glm_image_client.errors import GlmImageClientError

PROGRAM: Final = "glm-image"
WAIT_SECONDS: Final = 600
"""The longest wait of ``--wait`` without a number: a large checkpoint loads for minutes."""

USAGE_ERROR: Final[Any] = typer.BadParameter.__mro__[2]
"""The class of errors in the arguments; typer does not export it."""

_NUMBER: Final = re.compile(r"\d+(\.\d*)?")


class Application(TyperGroup):
    """Prints every error in one form, with ``--json`` as a JSON object, and exits with its code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        given = with_wait_seconds(list(sys.argv[1:] if args is None else args))
        as_json = "--json" in given[: _end_of_flags(given)]
        try:
            code = super().main(
                given, PROGRAM if prog_name is None else prog_name, complete_var, standalone_mode=False, **extra
            )
        except GlmImageClientError as error:
            code = exit_code_of(error)
            print_error(error, as_json)
        except USAGE_ERROR as error:
            code = print_usage_error(error, as_json)
        except (KeyboardInterrupt, typer.Abort):
            code = EXIT_INTERRUPTED
        sys.exit(code)


app = typer.Typer(
    name=PROGRAM,
    cls=Application,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to the application as the command of its name; see ``flags.with_flags`` for its parameters."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        # The first line of the docstring, whole: typer cuts what it takes from there itself.
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        app.command(short_help=summary, **settings)(with_flags(function))
        return function

    return add


def with_wait_seconds(arguments: list[str]) -> list[str]:
    """Returns arguments in which ``--wait`` has its seconds, which may be omitted."""
    end = _end_of_flags(arguments)
    given = [
        f"{argument}={WAIT_SECONDS}"
        if argument == "--wait" and not _NUMBER.fullmatch(next(iter(arguments[index + 1 :]), ""))
        else argument
        for index, argument in enumerate(arguments[:end])
    ]
    return [*given, *arguments[end:]]


def _end_of_flags(arguments: list[str]) -> int:
    """Returns the index of ``--``, after which nothing is a flag."""
    return arguments.index("--") if "--" in arguments else len(arguments)


def main() -> NoReturn:
    """The entry point; exits 0 done, 2 refused input, 3 server unreachable, 4 server error, 130 interrupted."""
    app()
    raise AssertionError("the application has exited")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def glm_image(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """GLM-Image: generates images from prompts."""
