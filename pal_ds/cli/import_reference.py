"""`import-reference` on the command line."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import as_path, mixture


class ImportReference:
    """Checkpoint of the PAL reference to a reward model folder and a user table.

    CHECKPOINT is a Lightning .ckpt or a state dict of RamyaLab/pluralistic-alignment; no object in it is loaded.
    --config is the file of config/prefLearner_config that it was trained with, for tensors do not say which variant
    they belong to. OUT loads as the folders of `consolidate` do; --users_out is a table as `adapt` leaves it.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", type=str, help=".ckpt or state dict")
        parser.add_argument("out", type=str, help="folder to make")
        parser.add_argument("--config", type=str, required=True, help="its prefLearner_config")
        parser.add_argument(
            "--backbone",
            type=str,
            required=True,
            help="folder of its llm_name: config, tokenizer, and weights where CHECKPOINT has none",
        )
        parser.add_argument("--users_out", type=str, metavar="U", help="folder for the user table")
        whom = parser.add_mutually_exclusive_group()
        whom.add_argument("--user", type=str, metavar="ID", help="score for this user")
        whom.add_argument("--mixture", type=mixture, metavar="w1,..,wK")
        whom.add_argument("--population", action="store_true", help="mean of its users (default)")
        parser.add_argument(
            "--end_text",
            type=str,
            default="<|endoftext|>",
            help="end_of_conversation_token of its ds_config",
        )
        parser.add_argument(
            "--prompt_end", type=str, default=" Assistant:", help="how every prompt ended (PAL-B)"
        )
        parser.add_argument(
            "--max_length", type=int, default=512, help="max_seq_len of its ds_config"
        )
        parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
        parser.add_argument(
            "--max_shard_size", type=str, default="4GB", help="of a weight file, as in 500MB"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.export.pal_reference.checkpoint import ImportOptions, import_checkpoint

        out = Path(options.out)
        import_options = ImportOptions(
            config=Path(options.config),
            backbone=Path(options.backbone),
            users_out=as_path(options.users_out),
            user=options.user,
            mixture=options.mixture,
            end_text=options.end_text,
            prompt_end=options.prompt_end,
            max_length=options.max_length,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
        )
        facts = import_checkpoint(Path(options.checkpoint), out, import_options)
        print(f"{out}: {facts['head']}, scores for {facts['audience']}")
