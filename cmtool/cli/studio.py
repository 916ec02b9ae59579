"""`cmtool studio`: a page on this machine to paint, edit and interpolate with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmtool.cli.app import command
from cmtool.cli.options import Device, Json, Model, Precision, Quiet

if TYPE_CHECKING:
    from cmtool.api.find import FoundModel

Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Where to listen; 0 takes a free one.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Print the address and open nothing.")]


@dataclass(frozen=True, kw_only=True)
class StudioOptions:
    """Options of `cmtool studio`, in the order of the help."""

    model: Model = None
    port: Port = 0
    no_browser: NoBrowser = False
    device: Device = "auto"
    precision: Precision = "auto"
    json: Json = False
    quiet: Quiet = False


@command
def studio(options: StudioOptions) -> None:
    """Paint a mask or strokes in the browser and see edits; on this machine alone.

    Without --model: the newest run, else a model that came along. Ctrl-C ends it.

    Example: cmtool studio --model demo/avatars
    """
    from cmtool.cli.output import Output

    output = Output(options.json, options.quiet)
    found, name = _find(options.model)
    output.say(found.describe())
    from cmtool.api.find import load_model
    from cmtool.api.model import Model as Loaded
    from cmtool.studio.server import StudioServer
    from cmtool.studio.work import Workshop

    loaded = Loaded(load_model(found, options.device, options.precision), found.path)
    with StudioServer(Workshop(loaded, name), options.port) as server:
        output.result(server.url)
        output.json({"url": server.url, "port": server.server_port, "model": str(found.path)})
        output.say("Ctrl-C ends it; the address works on this machine alone and holds its password.")
        _serve(server, options.no_browser)
    output.say("ended")


# What a model's data may say that the page has no place for.
UNFIT = {
    "float_samples": "makes points, not pictures",
    "condition": "is conditioned on a picture",
}


def _serve(server: Any, no_browser: bool) -> None:
    import webbrowser

    if not no_browser:
        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return  # the way it is meant to be ended


def _find(given: str | None) -> tuple[FoundModel, str]:
    """Return the model and how it is named in a command: as given, the newest run, or one that came along."""
    from cmtool.api.find import find_model
    from cmtool.errors import UserError

    def images(header: Any) -> bool:
        return not any(header["data"].get(key) for key in UNFIT)

    try:
        found = find_model(given, kinds=("consistency",), fits=images, wanted="consistency model of images")
    except UserError:
        from cmtool.interop.published import demo_names

        demos = sorted(demo_names(), key=lambda name: (name == "demo/digits", name))  # color before gray
        if given is not None or not demos:
            raise
        return find_model(demos[0], kinds=("consistency",)), demos[0]
    for reason in (reason for key, reason in UNFIT.items() if found.header["data"].get(key)):
        raise UserError(f"{found.path} {reason}.", "name another with --model")
    return found, given or str(found.path.parent if found.path.name == "model.safetensors" else found.path)
