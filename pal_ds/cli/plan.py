"""`plan` on the command line: will it fit?"""

from jsonargparse import ArgumentParser, Namespace

from pal_ds.config.recipe import add_recipe_arguments, as_recipe

GIB = 2**30


class Plan:
    """Parameters and bytes per GPU of a recipe under ZeRO-3, from the backbone's config.json alone.

    Nothing is allocated, and nothing downloaded but that config. All other options are those of `train`.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--num_gpus", type=int, required=True)
        add_recipe_arguments(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.backbones.transformer import architecture_config, read_model_config
        from pal_ds.modeling.memory_plan import plan_memory

        config = as_recipe(options)
        if config.backbone.architecture is None:
            model_config = read_model_config(config.backbone)
        else:
            model_config = architecture_config(config.backbone, config.data.vocab_size)
        plan = plan_memory(config, model_config, options.num_gpus)
        print(
            f"{options.num_gpus} GPUs, {plan.num_parameters:,} parameters, {plan.num_trained:,} trained"
        )
        for name in ("weights", "optimizer", "gathered", "buckets", "activations", "total"):
            print(f"{name:12}{getattr(plan, name) / GIB:8.1f} GiB")
