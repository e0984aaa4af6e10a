"""Page in the browser for text to image and image to image.

    pip install 'svg-t2i[app]'
    python -m svg_t2i.app                                     the quickstart's toy model
    python -m svg_t2i.app --checkpoint pre-trained --share    any checkpoint that sample.py takes

One request runs at a time; up to --queue more wait. The page loads nothing from elsewhere. Its files are deleted after
a day, and when it ends. With --auth, or with user:password in the environment as SVG_T2I_APP_AUTH, it asks who comes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import sys
from pathlib import Path

import torch

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import REPO_ROOT, UserError, build, locate, read_config, short_path
from autoencoder.common.processes import choose_device
from autoencoder.sources.opening import open_source
from autoencoder.sources.source import Reading
from svg_t2i.loading.adapters import AdapterShelf
from svg_t2i.loading.quantization import KINDS
from svg_t2i.rendering.arguments import quiet_imports
from svg_t2i.sampling.options import PRESET_NAMES, preset_options
from svg_t2i.text.files import read_prompts
from svg_t2i.training.settings import TrainConfig
from svg_t2i.web.limits import Limits
from svg_t2i.web.requests import Studio

EXAMPLES = 4
QUICKSTART = Path("outputs/quickstart/transformer")
AUTH_VARIABLE = "SVG_T2I_APP_AUTH"


def find_quickstart() -> Path:
    """The toy model of scripts/quickstart.sh, in the working directory or the repository."""
    for folder in (Path(), REPO_ROOT):
        if (folder / QUICKSTART).is_dir():
            return folder / QUICKSTART
    raise UserError(
        f"no --checkpoint was given and there is no toy model in {QUICKSTART}; make one with "
        "`bash scripts/quickstart.sh --short`, or give --checkpoint"
    )


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser("svg_t2i.app", __doc__)
    parser.add_argument("--checkpoint", help="as for svg_t2i.sample (default: the quickstart's toy model)")
    parser.add_argument("--subfolder", help="which DiT, where --checkpoint holds several; has no default")
    parser.add_argument("--preset", choices=PRESET_NAMES, help="settings to start with (default: the model's own)")
    parser.add_argument("--quantization", choices=KINDS, help="weights in 8 bits (default: 16 or 32)")
    parser.add_argument("--loras", type=Path, metavar="FOLDER", help="adapters to choose from (default: none)")
    parser.add_argument("--licence", help="of the model, shown on the page (default: what its folder says)")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--cpu_offload", action="store_true", help="the networks take turns on the GPU")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers, for 72 hours")
    parser.add_argument("--auth", type=Path, help="file with lines user:password (default: everyone may come in)")
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait")
    parser.add_argument("--max_side", type=int, default=Limits.side, help="largest height and width, pixels")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries say while they load")
    return parser.parse_args(argv)


def read_auth(file: Path | None) -> list[tuple[str, str]] | None:
    """Who may come in, as (user, password): of the file, or else of the environment; None for everyone.

    Raises:
        UserError: no such file, or a line of another form. The message holds no password.
    """
    source, lines = f"${AUTH_VARIABLE}", [os.environ.get(AUTH_VARIABLE, "")]
    if file is not None:
        try:
            source, lines = f"--auth {file}", file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--auth {file}: cannot be read ({error}); give a file with lines user:password") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            user, _, password = line.strip().partition(":")
            if not user or not password:
                raise UserError(f"{source}: line {number} is not of the form user:password")
            pairs.append((user, password))
    if file is not None and not pairs:
        raise UserError(f"{source}: the file is empty; write lines user:password")
    return pairs or None


def check_port(host: str, port: int) -> None:
    """UserError unless the page could be served there; found before a model is loaded."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: ports go from 1 to 65535")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({error.strerror or error}); choose another, or leave --port "
            "out for a free one"
        ) from error


def load_studio(arguments: argparse.Namespace) -> Studio:
    """The studio that the command line describes."""
    checkpoint = arguments.checkpoint or find_quickstart()
    adapters = AdapterShelf(arguments.loras)
    device = choose_device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    quiet_imports(arguments.verbose)
    from svg_t2i.pipeline import SVGT2IPipeline, set_verbosity  # diffusers takes seconds to import

    set_verbosity(arguments.verbose)
    pipeline = SVGT2IPipeline.from_pretrained(
        checkpoint, subfolder=arguments.subfolder, torch_dtype=dtype, quantization=arguments.quantization
    )
    if arguments.cpu_offload:
        pipeline.enable_model_cpu_offload(device)
    else:
        pipeline.to(device)
    preset = arguments.preset or (None if arguments.checkpoint else "quickstart")
    if preset:
        pipeline.options = preset_options(preset, pipeline.options)
    pipeline.set_progress_bar_config(disable=True)
    return Studio(
        pipeline,
        Limits(side=arguments.max_side),
        name=short_path(checkpoint),
        licence=arguments.licence or stated_licence(Path(checkpoint)),
        adapters=adapters,
        examples=example_prompts(Path(checkpoint)),
    )


def stated_licence(folder: Path) -> str | None:
    """What a model's folder says: `license` at the top of its README.md (a model card), or the title of its LICENSE."""
    card = folder / "README.md"
    if card.is_file() and (found := re.search(r"^license: *(\S+)", card.read_text(errors="replace"), re.MULTILINE)):
        return found[1]
    file = folder / "LICENSE"
    lines = file.read_text(errors="replace").split("\n") if file.is_file() else []
    return next((line.strip() for line in lines if line.strip()), None)


def example_prompts(folder: Path) -> list[str]:
    """Prompts to begin with: those of the run's pictures during training, of its data, or the repository's."""
    config = folder / "config.yaml"
    if not config.is_file():
        return [prompt.text for prompt in read_prompts(REPO_ROOT / "configs" / "example_prompts.txt")[:EXAMPLES]]
    try:
        run = build(TrainConfig, read_config(config), str(config))
        data = run.data.all_sources[0].path
        if run.samples.prompts or not locate(data).exists():  # nothing is downloaded for an example
            return list(run.samples.prompts[:EXAMPLES])
        source = open_source(data, Reading())
        places = random.Random(0).sample(range(len(source)), min(len(source), 10 * EXAMPLES))
        return list(dict.fromkeys(source[i].captions[0] for i in places if source[i].captions))[:EXAMPLES]
    except UserError as error:
        print(f"no examples on the page: {error}", flush=True)
        return []


@command
def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    arguments = parse_arguments(argv)
    try:
        from svg_t2i.web.page import launch
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install 'gradio>=6.17,<7'") from error
    if arguments.queue < 1:
        raise UserError(f"--queue {arguments.queue}: must be at least 1")
    if arguments.port is not None:
        check_port(arguments.host, arguments.port)
    auth = read_auth(arguments.auth)
    if auth is None and (arguments.share or arguments.host not in ("127.0.0.1", "localhost", "::1")):
        print("everyone who reaches the page can use it; --auth FILE asks for a user and a password", flush=True)
    studio = load_studio(arguments)
    where = {"server_name": arguments.host, "server_port": arguments.port, "share": arguments.share, "auth": auth}
    os.environ.setdefault("GRADIO_TEMP_DIR", str(studio.folder / "gradio"))  # uploads and previews end with the studio
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an orderly end, which deletes the files
    launch(studio, max_waiting=arguments.queue, **where)


if __name__ == "__main__":
    main()
