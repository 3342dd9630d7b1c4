"""`pal-ds plan` under the name that scripts know: will a recipe fit?

python tools/plan.py --num_gpus 64 --config llama_70b_full.yaml [--backbone.path DIR] [--train.micro_batch_tokens 4096]
"""

from pal_ds.cli.main import run_tool


def main(arguments: list[str] | None = None) -> None:
    run_tool("plan", arguments)


if __name__ == "__main__":
    main()
