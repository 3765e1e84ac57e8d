"""Pulling from the hub, against a local server. Each pull is a process: huggingface_hub reads HF_* when imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _hub_server import COMMIT, Hub, serve
from _models import Shape, phi3_config, write_model

PULL = """
import json, shutil, sys, time
from collections import namedtuple
import huggingface_hub.constants
from phi3edge.sources import resolve
from phi3edge.errors import Phi3EdgeError
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 50_000  # 10 MB otherwise: more than the files of these tests
time.sleep = lambda seconds: None  # between retries
if sys.argv[2] != "-":
    shutil.disk_usage = lambda path: namedtuple("Usage", "total used free")(0, 0, int(sys.argv[2]))
told = []
try:
    with resolve(sys.argv[1], progress=lambda *args: told.append(args)) as checkpoint:
        weights = float(sum(checkpoint.read(name).astype("f8").sum() for name in checkpoint.names))
        print(json.dumps({"path": str(checkpoint.path), "repository": checkpoint.source.repository,
                          "revision": checkpoint.source.revision, "licence": checkpoint.source.licence,
                          "name": checkpoint.name, "weights": weights, "told": told}))
except Phi3EdgeError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint or "", "told": told}))
"""
SHAPE = Shape(layers=1)
SHARDS = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}


class Client:
    """A user with an own cache folder."""

    def __init__(self, home: Path, url: str) -> None:
        self.home, self.url = home, url

    def run(self, code: str, *arguments: str, **env: str) -> str:
        """What a piece of Python prints in a new process."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.url, "NO_PROXY": "*", "no_proxy": "*"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=kept | settings | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # neither bars nor warnings of the libraries below
        return done.stdout.strip()

    def pull(self, name: str, free: int | None = None, **env: str) -> dict[str, Any]:
        """Resolve a name in a new process; `free` is what it is told of the disk."""
        result = json.loads(self.run(PULL, name, "-" if free is None else str(free), **env))
        assert "\n" not in result.get("message", "")
        return result

    def partial(self) -> dict[str, int]:
        return {p.name: p.stat().st_size for p in self.home.rglob("*.incomplete")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("served") / "tiny", SHAPE, shards=3)
    for name in ("pytorch_model.bin", "training_args.bin", "sample_finetune.py", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(model: Path) -> Any:
    with serve(Hub({"org/tiny": model})) as hub:
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(tmp_path / "home", hub.url)


def test_pull_brings_what_the_export_needs_and_no_more(hub: Hub, client: Client, model: Path) -> None:
    result = client.pull("org/tiny")
    assert result["revision"] == COMMIT
    assert (result["repository"], result["licence"], result["name"]) == ("org/tiny", "mit", "tiny")
    wanted = SHARDS | {"config.json", "generation_config.json", "model.safetensors.index.json", "README.md"}
    wanted |= {"tokenizer.json", "tokenizer_config.json"}
    assert hub.fetched() == wanted
    assert {p.name for p in Path(result["path"]).iterdir()} == wanted
    for name in wanted:
        assert (Path(result["path"]) / name).read_bytes() == (model / name).read_bytes()
    total = sum((model / name).stat().st_size for name in SHARDS)
    assert result["told"][-1] == ["pull org/tiny", total, total]
    assert client.partial() == {}
    asked = len(hub.asked)
    again = client.pull("org/tiny")
    assert again["weights"] == result["weights"]
    assert not any("/storage/" in path for _, path, _ in hub.asked[asked:])


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_the_revision_is_resolved_to_a_commit(hub: Hub, client: Client, revision: str) -> None:
    result = client.pull(f"org/tiny@{revision}")
    assert result["revision"] == COMMIT
    asked = len(hub.asked)
    assert client.pull(f"org/tiny@{COMMIT}")["path"] == result["path"]
    assert len(hub.asked) == asked  # a complete commit cannot have changed
    assert (
        client.pull("org/tiny@v1" if revision == "v1" else f"org/tiny@{COMMIT}", HF_HUB_OFFLINE="1")["revision"]
        == COMMIT
    )


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, client: Client) -> None:
    hub.break_after = [100_000]
    assert client.pull("org/tiny")["revision"] == COMMIT
    assert hub.ranges() in (["bytes=50000-"], ["bytes=100000-"])


def test_a_pull_that_died_goes_on_in_the_next_process(hub: Hub, client: Client, model: Path) -> None:
    hub.die_after = 100_000
    result = client.pull("org/tiny")
    assert result["error"] == "HubError"
    assert result["message"].startswith(f"the connection to {hub.url} failed")
    assert "run the same command again" in result["hint"]
    # the file whose connection died; another may have arrived whole at the same time, and needs no request any more
    kept = next(count for count in client.partial().values() if count in (50_000, 100_000))
    hub.die_after = None
    hub.asked.clear()
    assert client.pull("org/tiny")["revision"] == COMMIT
    assert f"bytes={kept}-" in hub.ranges()
    assert client.partial() == {}


def test_damage_on_the_way_is_noticed(hub: Hub, client: Client) -> None:
    hub.damage = True
    result = client.pull("org/tiny")
    assert "arrived damaged: sha256" in result["message"]
    hub.damage = False
    assert client.pull("org/tiny")["revision"] == COMMIT


def test_offline(hub: Hub, client: Client, model: Path) -> None:
    result = client.pull("org/tiny", HF_HUB_OFFLINE="1")
    assert result["error"] == "HubError"
    assert result["message"].startswith("HF_HUB_OFFLINE is set, and org/tiny is not complete in")
    assert hub.asked == []
    pulled = client.pull("org/tiny")
    asked = len(hub.asked)
    assert client.pull("org/tiny", HF_HUB_OFFLINE="1") == pulled | {"told": []}
    (Path(pulled["path"]) / min(SHARDS)).unlink()
    assert "is not complete" in client.pull("org/tiny", HF_HUB_OFFLINE="1")["message"]
    assert len(hub.asked) == asked


def test_without_weights_only_what_describes_the_model_is_fetched(hub: Hub, client: Client) -> None:
    code = "import sys; from phi3edge.sources import resolve_spec; print(resolve_spec(sys.argv[1]).layers)"
    assert client.run(code, "org/tiny") == "1"
    assert hub.fetched()
    assert not SHARDS & hub.fetched()
    assert client.run(code, "org/tiny", HF_HUB_OFFLINE="1") == "1"
    assert "is not complete" in client.pull("org/tiny", HF_HUB_OFFLINE="1")["message"]
    assert client.pull("org/tiny")["revision"] == COMMIT


def test_no_server(client: Client) -> None:
    client.url = "http://127.0.0.1:9"
    result = client.pull("org/tiny")
    assert result["error"] == "HubError"
    assert result["message"].startswith("the connection to http://127.0.0.1:9 failed: ")


def test_gated_missing_and_refused(hub: Hub, client: Client, model: Path) -> None:
    hub.repositories["org/closed"] = model
    hub.gated = {"org/closed"}
    for name, env, message, hint in (
        ("org/closed", {}, "org/closed is gated", "ask for access"),
        ("org/none", {}, f"{hub.url} has no model org/none, or it is private", "check the spelling"),
        ("org/tiny@v9", {}, "org/tiny has no revision 'v9'", "see http"),
        ("org/tiny@../../x", {}, "'../../x' is not a revision", ""),
        ("org/tiny", {"HF_TOKEN": "hf_bad"}, f"{hub.url} refused the token (HTTP 401) for org/tiny", "HF_TOKEN"),
        ("org--x/tiny", {}, "'org--x/tiny' is not a model's name", "organization/name"),
    ):
        result = client.pull(name, **env)
        assert result["error"] == "HubError"
        assert result["message"].startswith(message)
        assert hint in result["hint"]
    assert client.pull("org/closed", HF_TOKEN=hub.token)["revision"] == COMMIT
    assert hub.leaked == []


def test_a_server_that_fails(hub: Hub, client: Client) -> None:
    hub.status = 503
    result = client.pull("org/tiny")
    assert result["message"].startswith(f"{hub.url} failed: ")
    assert "503" in result["message"]


def test_no_space_is_found_before_the_weights(hub: Hub, client: Client) -> None:
    result = client.pull("org/tiny", free=500_000)
    assert result["message"].startswith("no space: org/tiny needs 0.00 GB more")
    assert "HF_HOME" in result["hint"]
    assert not SHARDS & hub.fetched()
    assert client.pull("org/tiny", free=10**9)["revision"] == COMMIT


def test_what_cannot_be_exported_is_refused_before_the_weights(hub: Hub, client: Client, tmp_path: Path) -> None:
    for n, (config, error, message) in enumerate(
        (
            (phi3_config(SHAPE, model_type="phi4mm"), "UnsupportedError", "needs code of the repository"),
            (phi3_config(SHAPE, hidden_act="gelu"), "UnsupportedError", "hidden_act is 'gelu'"),
        )
    ):
        folder = write_model(tmp_path / str(n), SHAPE)
        (folder / "config.json").write_text(json.dumps(config))
        hub.repositories["org/other"] = folder
        result = Client(tmp_path / f"home{n}", hub.url).pull("org/other")
        assert result["error"] == error
        assert message in result["message"]
    assert not {name for name in hub.fetched() if name.endswith(".safetensors")}


def test_pickles_are_refused_before_anything_is_downloaded(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pickle", SHAPE)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.repositories["org/pickle"] = folder
    result = client.pull("org/pickle")
    assert result["error"] == "CheckpointError"
    assert "org/pickle has its weights as a pickle (pytorch_model.bin)" in result["message"]
    assert hub.fetched() == set()


def test_the_commands_pull_plan_and_export_by_name(hub: Hub, client: Client, tmp_path: Path) -> None:
    command = "import sys; from phi3edge.cli.app import main; sys.argv[0] = 'phi3edge'; main()"
    plan = json.loads(client.run(command, "plan", "org/tiny", "--target", "android", "--json"))
    assert plan["fit"]["fits"]
    assert not hub.fetched() & SHARDS
    pulled = json.loads(client.run(command, "pull", "org/tiny@v1", "--json"))
    assert pulled["revision"] == COMMIT
    out = str(tmp_path / "out")
    options = ("--target", "cpu", "--recipe", "q8_0", "--no-validate", "--out", out, "--json")
    client.run(command, "export", "org/tiny@v1", *options)
    said = json.loads((tmp_path / "out" / "phi3edge.json").read_text())
    assert said["model"]["checkpoint"] == f"org/tiny@{COMMIT}"
    assert (said["model"]["repository"], said["model"]["licence"]) == ("org/tiny", "mit")
    text = tmp_path / "text.txt"
    text.write_text("the thing and the other thing in the end are the same thing " * 200)
    options = ("--text", str(text), "--chunks", "1", "--threads", "1", "--json")
    report = json.loads(client.run(command, "validate", out, *options, HF_HUB_OFFLINE="1"))
    assert report["checkpoint"] == {"name": "tiny", "repository": "org/tiny", "revision": COMMIT}
