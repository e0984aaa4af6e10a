"""Train the SVG autoencoder.

    python -m autoencoder.train --config configs/autoencoder/demo/FILE.yaml [--devices N] [key.sub=value ...]

Everything is in the config file (`training.settings` has its schema, `training.module` draws the folder that a run
writes); further arguments override it. A run that finds a checkpoint in its folder goes on from there. Asked to end by
SIGTERM, SIGUSR1 or Ctrl-C it finishes the step, saves, and exits with code 75 (130 after Ctrl-C).
"""

from __future__ import annotations

import logging
from pathlib import Path

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import find_config, load_config


@command
def main(argv: list[str]) -> None:
    """Train from the configuration that the command line names; SystemExit where a run stopped early."""
    parser = Parser("autoencoder.train", __doc__)
    parser.add_config("YAML file, with or without .yaml, also from the root of the repository")
    parser.add_argument("--devices", type=int, help="processes on this machine; default: training.trainer.devices")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.devices is not None:
        arguments.overrides.append(f"training.trainer.devices={arguments.devices}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from autoencoder.training.run import train  # Lightning takes seconds to import
    from autoencoder.training.settings import AutoencoderTrainConfig

    config = load_config(AutoencoderTrainConfig, arguments.config, arguments.overrides)
    code = train(config, Path(config.training.logdir) / find_config(arguments.config).stem)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
