"""Scores texts with exported folders as a stranger would: transformers alone, no pal_ds, no DeepSpeed.

Run as `python -I reader.py JOBS.json RESULTS.json`, from anywhere.
"""

import json
import sys

HIDDEN = ("pal_ds", "deepspeed", "jaxtyping", "peft")


class Hide:
    """A finder of modules that does not find some."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def score(model, tokenizer, job, way):
    import torch

    texts, size = job["texts"], way.get("batch", len(job["texts"]))
    scores = []
    with torch.no_grad():
        for start in range(0, len(texts), size):
            batch = tokenizer(
                texts[start : start + size],
                padding=True,
                padding_side=way["side"],
                add_special_tokens=way["special"],
                return_tensors="pt",
            )
            scores += model(**batch).logits[:, 0].tolist()
    return scores


def main(jobs_file, results_file):
    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    import importlib.util

    assert all(importlib.util.find_spec(name) is None for name in HIDDEN)
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    results = []
    with open(jobs_file) as stream:
        jobs = json.load(stream)
    for job in jobs:
        options = {"trust_remote_code": True} if job["trust"] else {}
        mixture = {} if job["mixture"] is None else {"mixture": job["mixture"]}
        model = AutoModelForSequenceClassification.from_pretrained(
            job["folder"], **options, **mixture
        ).eval()
        # No code is needed for a tokenizer, and transformers 4 does not ask about the model's.
        leave = {"trust_remote_code": False} if transformers.__version__ >= "5" else {}
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], **leave)
        scores = [score(model, tokenizer, job, way) for way in job["ways"]]
        version = transformers.__version__
        results.append({"class": type(model).__name__, "scores": scores, "transformers": version})
        if job.get("pipeline"):
            classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
            results[-1]["pipeline"] = [row["score"] for row in classify(job["texts"])]
            # From paths alone, as a manual shows it; transformers finds the tokenizer by itself, or by the same path.
            for more in ({}, {"tokenizer": job["folder"]}):
                classify = pipeline("text-classification", model=job["folder"], **more, **options)
                same = [row["score"] for row in classify(job["texts"])]
                assert same == results[-1]["pipeline"] or job["mixture"], (job["folder"], same)
    with open(results_file, "w") as stream:
        json.dump(results, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
