"""A checkpoint of the PAL reference (RamyaLab/pluralistic-alignment) -> reward model folder and user table.

python tools/import_reference.py CHECKPOINT OUT --config PREFLEARNER.yaml --backbone FOLDER [--users_out U]
    [--user ID | --mixture w1,..,wK | --population]

CHECKPOINT is a Lightning .ckpt or a state dict; no object in it is loaded. PREFLEARNER.yaml is the file of
config/prefLearner_config that it was trained with, for tensors do not say which variant they belong to.
OUT loads as tools/consolidate.py's folders do; U is a table as `adapt` leaves it.
"""

import argparse
import logging
import os
from pathlib import Path

from pal_ds.cli.arguments import mixture
from pal_ds.errors import UserError, end_with


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Checkpoint of the PAL reference -> reward model.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".ckpt or state dict")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--config", type=Path, required=True, help="its prefLearner_config")
    parser.add_argument(
        "--backbone",
        type=Path,
        required=True,
        help="folder of its llm_name: config, tokenizer, and weights where CHECKPOINT has none",
    )
    parser.add_argument("--users_out", type=Path, metavar="U", help="folder for the user table")
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--user", metavar="ID", help="score for this user")
    whom.add_argument("--mixture", type=mixture, metavar="w1,..,wK")
    whom.add_argument("--population", action="store_true", help="mean of its users (default)")
    parser.add_argument(
        "--end_text", default="<|endoftext|>", help="end_of_conversation_token of its ds_config"
    )
    parser.add_argument(
        "--prompt_end", default=" Assistant:", help="how every prompt ended (PAL-B)"
    )
    parser.add_argument("--max_length", type=int, default=512, help="max_seq_len of its ds_config")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--max_shard_size", default="4GB", help="of a weight file, as in 500MB")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here: torch takes seconds, and `--help` should not pay for it.
    from pal_ds.export.pal_reference.checkpoint import ImportOptions, import_checkpoint

    given = {key: value for key, value in vars(options).items() if key != "population"}
    checkpoint, out = given.pop("checkpoint"), given.pop("out")
    try:
        facts = import_checkpoint(checkpoint, out, ImportOptions(**given))
    except (UserError, OSError) as error:
        end_with(error, "import_reference")
    print(f"{out}: {facts['head']}, scores for {facts['audience']}")


if __name__ == "__main__":
    main()
