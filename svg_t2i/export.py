"""Write the weights of a run or checkpoint as files to share.

python -m svg_t2i.export results/stage3_1024 exported                  # config.json, safetensors, a model card
python -m svg_t2i.export results/stage3_1024 exported --published      # consolidated*.pth, model_args.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autoencoder.common.commands import Parser, command
from autoencoder.common.config import UserError
from svg_t2i.checkpoints.card import read_metrics
from svg_t2i.checkpoints.weights import export, export_as_published


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("svg_t2i.export", __doc__)
    parser.add_argument("folder", help="results folder (its newest checkpoint), checkpoint, published folder, …")
    parser.add_argument("out", help="a folder that does not exist yet")
    parser.add_argument("--published", action="store_true", help="the release's file names: raw and averaged weights")
    parser.add_argument("--no_aux_head", action="store_true", help="without the auxiliary head of a run with aux.loss")
    parser.add_argument("--license", help="of these weights, for the model card: apache-2.0, … (default: not stated)")
    parser.add_argument("--metrics", type=Path, help="metrics.json of svg_t2i.benchmark, for the card (default: none)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--raw", action="store_true", help="raw weights instead of averaged ones")
    weights.add_argument("--ema_decay", type=float, help="the average with this decay (default: the run's first)")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> None:
    """Write what the command line asks for."""
    arguments = parse_arguments(argv)
    if arguments.published and arguments.raw:
        raise UserError("--raw does not go with --published, which writes raw and averaged weights")
    if arguments.published and (arguments.license or arguments.metrics):
        raise UserError("--license and --metrics are for the model card, which --published does not write")
    metrics = None if arguments.metrics is None else read_metrics(arguments.metrics)
    from svg_t2i.loading.sources import find_transformer  # imports transformers, which --help need not wait for

    folder = find_transformer(arguments.folder)
    average = not arguments.raw if arguments.ema_decay is None else arguments.ema_decay
    if arguments.published:
        written = export_as_published(folder, arguments.out, average)
    else:
        written = export(
            folder,
            arguments.out,
            average,
            aux_head=not arguments.no_aux_head,
            licence=arguments.license,
            metrics=metrics,
        )
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
