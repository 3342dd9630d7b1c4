"""A hub that is silent, gated or knows nothing, and files that are missing: one message, code 2."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub.constants
import pytest
import yaml

from pal_ds.cli.main import main
from pal_ds.config.recipe import read_recipe
from pal_ds.data.prepare import settings_of
from pal_ds.data.sources.open_split import open_split

HUB_SOURCES = {
    "SummarizeFromFeedback": {},
    "HhRlhf": {},
    "WebGpt": {},
    "UltraFeedbackP": {},
    "Prism": {},
    "CommunityAlignment": {},
    "PersonalLlm": {},
    "PickAPic": {"images": "i.npy", "captions": "c.npy"},
    "PickAFilter": {
        **{key: f"{key}.npy" for key in ("images", "blue_images", "red_images", "captions")}
    },
}
LOCAL_SOURCES = {"Gpt4Llm": {"path": "comparison_data_v2.json"}, "VplPets": {}}


@pytest.fixture
def hub(monkeypatch):
    """(answers, asked): what the hub says to each path, and what it was asked; it says 404 else."""
    answers: dict[str, tuple[int, str | None, dict]] = {}
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            status, code, body = answers.get(path, (404, "RepoNotFound", {}))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        try:
            yield answers, asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `prepare` with a source; returns its message once it ended with code 2 and left nothing."""

    def run(name, **options):
        recipe = tmp_path / "recipe.yaml"
        source = {"class_path": name, "init_args": options}
        data = {"path": str(tmp_path / "DATA"), "source": source}
        recipe.write_text(yaml.safe_dump({"data": data}))
        with pytest.raises(SystemExit) as end:
            main(["prepare", f"--config={recipe}"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in said and said.count("error: ") == 1, said
        assert not (tmp_path / "DATA").exists()
        return said

    return run


@pytest.mark.parametrize("name", HUB_SOURCES)
def test_a_hub_that_cannot_be_reached(refused, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused(name, **HUB_SOURCES[name])
    assert "the Hugging Face hub cannot be reached" in said
    assert "hf download " in said and "--repo-type dataset" in said


@pytest.mark.parametrize("path", ["./wrong", "../wrong", "~/wrong", "/no/such/folder", "a/b/c"])
def test_a_wrong_path_is_not_asked_of_the_hub(refused, hub, path):
    assert f"{path}: no such file or folder (looked from " in refused("HhRlhf", path=path)
    assert hub[1] == []


def test_offline_by_choice_asks_nobody(refused, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("UltraFeedbackP")
    assert hub[1] == []


PRISM = "/api/datasets/HannahRoseKirk/prism-alignment"
INFO = {"id": "HannahRoseKirk/prism-alignment", "sha": "0" * 40, "siblings": [], "tags": []}


@pytest.mark.parametrize("step", ["info", "auth-check"])
def test_a_licence_gate(refused, hub, step):
    answers, asked = hub
    if step == "auth-check":
        answers[PRISM] = 200, None, {**INFO, "private": False, "gated": "manual", "downloads": 1}
    answers[PRISM if step == "info" else f"{PRISM}/auth-check"] = 403, "GatedRepo", {}
    said = refused("Prism")
    assert "licence gate" in said and "accept its terms at http" in said
    assert "/datasets/HannahRoseKirk/prism-alignment" in said and "hf auth login" in said
    assert len(asked) <= 2


def test_a_name_the_hub_does_not_know_and_a_hub_that_fails(refused, hub):
    answers, asked = hub
    assert "neither a file or folder here nor a dataset" in refused("Prism", path="some/prism")
    answers[PRISM] = 503, None, {}
    assert "it answers 503" in refused("Prism") and asked.count(PRISM) == 1


def test_a_missing_local_file(refused, tmp_path):
    assert "none.jsonl: no such file" in refused("Prism", path=str(tmp_path / "none.jsonl"))
    assert "none.json: no such file" in refused("Gpt4Llm", path=str(tmp_path / "none.json"))
    said = refused("PersonalLlm", path={"train": str(tmp_path / "none.parquet")})
    assert "none.parquet: no such file" in said
    (tmp_path / "rows.txt").write_text("x")
    said = refused("PersonalLlm", path={"train": str(tmp_path / "rows.txt")})
    assert "ends in none of .parquet" in said


def test_a_silent_hub_leaves_datasets_to_its_cache(monkeypatch):
    """`datasets` asks six times with pauses unless told that it is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    offline, cached = [], datasets.Dataset.from_dict({"a": [1, 2]})

    def load(*_, **__):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return cached

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_split("some/name", "train") is cached
    assert offline == [True] and datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name", HUB_SOURCES | LOCAL_SOURCES)
def test_each_source_is_known_to_recipes_by_its_short_name(tmp_path, name):
    options = (HUB_SOURCES | LOCAL_SOURCES)[name]
    recipe = tmp_path / "recipe.yaml"
    source = {"class_path": name, "init_args": options}
    recipe.write_text(yaml.safe_dump({"data": {"path": "D", "source": source}}))
    config, text = read_recipe([f"--config={recipe}", "--head=BradleyTerry"])
    assert type(config.data.source).__name__ == name and config.data.source.licence
    # A run's own recipe, as written to its config.yaml, gives the same source again.
    recipe.write_text(text)
    again, _ = read_recipe([f"--config={recipe}"])
    settings = settings_of(config.data, read_source=False)
    assert settings == settings_of(again.data, read_source=False)
