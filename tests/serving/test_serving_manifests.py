"""The manifests of docs/scaling.md: commands that are understood, and names and ports by which the parts find each other."""

import json
import re

import pytest
import yaml

from ptuning.serving.doors import HostNames
from ptuning.serving.options import parse
from tests.conftest import REPO


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict]:
    """Kind and name → specification."""
    section = (REPO / "docs" / "scaling.md").read_text("utf-8").split("\n## Kubernetes\n")[1]
    code = re.search(r"```text\n(.*?)```", section, re.DOTALL)[1]
    return {(one["kind"], one["metadata"]["name"]): one["spec"] for one in yaml.safe_load_all(code)}


def container(spec: dict) -> dict:
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    (made,) = spec["template"]["spec"]["containers"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in made["volumeMounts"]} == volumes
    return made


def test_the_server(manifests, monkeypatch):
    monkeypatch.setenv("PTUNING_API_KEY", "k")  # what the secret sets: nothing else lets it listen on all addresses
    spec, service = manifests["Deployment", "ptuning"], manifests["Service", "ptuning"]
    made = container(spec)
    command, *flags = made["args"]
    options = parse(flags)
    assert command == "serve" and options.engine == "vllm"
    names = HostNames(options.host, options.allowed_host)
    for host in ("ptuning", "ptuning.team.svc.cluster.local", "10.1.2.3:7030"):  # of clients, and of the probe
        assert names.include(host), host
    (port,) = service["ports"]
    assert options.port == port["targetPort"] == made["ports"][0]["containerPort"]
    assert made["readinessProbe"]["httpGet"] == {"path": "/health", "port": options.port}
    assert service["selector"] == spec["selector"]["matchLabels"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > options.grace_seconds
    replicas, headless = manifests["StatefulSet", "vllm"], manifests["Service", "vllm"]
    assert headless["clusterIP"] == "None" and headless["selector"] == replicas["selector"]["matchLabels"]
    port = container(replicas)["ports"][0]["containerPort"]
    there = [f"http://vllm-{number}.{replicas['serviceName']}:{port}" for number in range(replicas["replicas"])]
    assert list(options.vllm_url) == there


def test_vllm(manifests):
    """Its options but for its own, as scripts/serve_vllm.sh gives them; the store is the server's."""
    made = container(manifests["StatefulSet", "vllm"])
    script = (REPO / "scripts" / "serve_vllm.sh").read_text("utf-8")
    flags = [flag for flag in made["args"] if flag.startswith("--")]
    assert all(f"{flag} " in script for flag in flags), flags
    transfer = json.loads(made["args"][made["args"].index("--kv-transfer-config") + 1])
    config = re.search(r'config="(.*?)"\n', script, re.DOTALL)[1].replace("\\\n", "").replace('\\"', '"')
    theirs = json.loads(config.replace("$prefixes", "/models/prefixes"))
    assert transfer == theirs
    store = manifests["Deployment", "ptuning"]["template"]["spec"]["containers"][0]["args"]
    assert transfer["kv_connector_extra_config"]["prefix_store"] == store[store.index("--prefix_store") + 1]
    (variable,) = made["env"]
    assert f"{variable['name']}={variable['value']} " in script
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert made[probe]["httpGet"]["port"] == made["ports"][0]["containerPort"]
