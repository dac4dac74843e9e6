"""``glm-image serve``: the server's own command."""

from __future__ import annotations

import typer

from glm_image_client.cli.application import command
from glm_image_client.cli.offline import server_modules


@command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def serve(context: typer.Context) -> None:
    """Serves a checkpoint with NVIDIA Triton; `glm-image serve --help` lists the flags."""
    (server,) = server_modules("serve", "supervisor.cli")
    raise typer.Exit(server.main(context.args, program="glm-image serve"))
