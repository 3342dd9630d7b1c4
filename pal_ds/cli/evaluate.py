"""The `evaluate` and `few_shot` commands: which sets, against what, on which ranks."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import add_run_arguments, as_path, keys
from pal_ds.runs.run_dir import RunDirectory


class Evaluate:
    """Accuracy per user of a run on a split or on files, or best of n; exact at any world size."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_run_arguments(parser)
        parser.add_argument("--split", type=str, default="test", help="split of the run's data")
        parser.add_argument(
            "--data", type=keys, default=[], help="JSONL of pairs in place of a split, FILE,.."
        )
        parser.add_argument("--name", type=str, help="result goes to eval/NAME.json")
        parser.add_argument("--users", type=str, help="users that `adapt` fitted")
        parser.add_argument(
            "--best_of_n",
            action="store_true",
            help="choose among candidates: lines of responses and scores, or what users compared",
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.config.run_config import TrainConfig
        from pal_ds.distributed.watchdog import watch
        from pal_ds.engine.process_group import joined_or_alone
        from pal_ds.eval.best_of_n import NAME_PREFIX, rank_set, ranking_line
        from pal_ds.eval.evaluate import evaluate_set, summary_line
        from pal_ds.eval.requests import eval_requests
        from pal_ds.inference.load_run import restore
        from pal_ds.inference.readers import known_users

        measure, line_of, prefix = evaluate_set, summary_line, ""
        if options.best_of_n:
            measure, line_of, prefix = rank_set, ranking_line, NAME_PREFIX
        files = [Path(file) for file in options.data]
        requests = eval_requests(options.split, files, options.name, prefix)
        run = RunDirectory(options.run_dir)
        # Alone it waits for nobody; who started it sees whether it goes on.
        with (
            joined_or_alone() as world,
            watch(
                world, run.path / "stacks", TrainConfig.hang_minutes if world.world_size > 1 else 0
            ),
        ):
            restored = restore(run, options.step, world.device, trust=options.trust_checkpoint)
            known = known_users(restored, as_path(options.users))
            for request in requests:
                figures = measure(restored, known, request, world)
                if world.is_rank_zero:
                    print(line_of(request.name, figures))
                    for warning in figures.get("warnings", []):
                        print(f"warning: {warning}")


class FewShot:
    """Accuracy of held-out users after k comparisons, for several k; result goes to eval/few_shot.json."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_run_arguments(parser)
        parser.add_argument(
            "--num_comparisons",
            type=list[int],
            default=[0, 1, 2, 4, 8, 16, 32, 50],
            help="values of k",
        )
        parser.add_argument(
            "--num_draws", type=int, default=20, help="random draws of the k comparisons"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.adaptation.few_shot import evaluate_few_shot, few_shot_lines

        figures = evaluate_few_shot(
            RunDirectory(options.run_dir),
            options.num_comparisons,
            options.num_draws,
            step=options.step,
            trust_checkpoint=options.trust_checkpoint,
        )
        print("\n".join(few_shot_lines(figures)))
