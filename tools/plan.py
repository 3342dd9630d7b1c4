"""Will it fit? Parameters and bytes per GPU of a recipe under ZeRO-3, from the backbone's config.json alone.

python tools/plan.py --num_gpus 64 --config llama_70b_full.yaml [--backbone.path DIR] [--train.micro_batch_tokens 4096]

All other options are those of `pal-ds train`. Nothing is allocated, and nothing downloaded but that config.
"""

import argparse

from pal_ds.errors import UserError, end_with

GIB = 2**30


def main(arguments: list[str] | None = None) -> None:
    """Prints the plan."""
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_gpus", type=int, required=True)
    options, recipe = parser.parse_known_args(arguments)
    # Imported here: torch takes seconds, and `--help` should not pay for it.
    from pal_ds.backbones.transformer import architecture_config, read_model_config
    from pal_ds.config.recipe import recipe_from_arguments
    from pal_ds.modeling.memory_plan import plan_memory

    try:
        config = recipe_from_arguments(recipe)
        if config.backbone.architecture is None:
            model_config = read_model_config(config.backbone)
        else:
            model_config = architecture_config(config.backbone, config.data.vocab_size)
        plan = plan_memory(config, model_config, options.num_gpus)
    except UserError as error:
        end_with(error, "plan")
    print(
        f"{options.num_gpus} GPUs, {plan.num_parameters:,} parameters, {plan.num_trained:,} trained"
    )
    for name in ("weights", "optimizer", "gathered", "buckets", "activations", "total"):
        print(f"{name:12}{getattr(plan, name) / GIB:8.1f} GiB")


if __name__ == "__main__":
    main()
