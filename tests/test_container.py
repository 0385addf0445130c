"""What the container files promise, as far as it can be read. `make image-test` builds and runs them."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml

from engine.config import DEFAULT_MODEL
from server.settings import load_config, read_file
from server.telemetry.metric_families import FAMILIES
from tests import ROOT

MONITORING = ROOT / "configs" / "monitoring"
KUBERNETES = ROOT / "configs" / "kubernetes"
IMAGE_TAG = re.compile(r"[\w-]+(/[\w-]+)?:v?\d+(\.\d+){1,2}[\w.-]*")  # no dot before the slash, so no host
TARGETS = ("cpu", "gpu")
targets = pytest.mark.parametrize("target", TARGETS)


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name; those before the first stage under ""."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        list(found.values())[-1].append((word, rest))
    return found


def arguments(stage: str, keyword: str) -> list[str]:
    return [rest for word, rest in stages()[stage] if word == keyword]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, object]]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def kubernetes(kind: str) -> dict:
    documents = [each for path in KUBERNETES.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def test_the_bases_are_pinned_and_others_may_be_named() -> None:
    defaults = dict(argument.partition("=")[::2] for argument in arguments("", "ARG"))
    assert set(defaults) == {"CPU_BASE", "GPU_BASE"}
    assert all(IMAGE_TAG.fullmatch(base) for base in defaults.values())
    assert defaults["GPU_BASE"].startswith("nvidia/cuda:")
    assert "-runtime-" in defaults["GPU_BASE"]
    for target in TARGETS:
        assert arguments(f"{target}-system", "FROM") == [f"${{{target.upper()}_BASE}} AS {target}-system"]


def test_the_image_that_is_built_if_none_is_named_is_for_a_cpu() -> None:
    assert list(stages())[-1] == "cpu"


@targets
def test_the_server_runs_as_a_user_with_a_number_which_clusters_can_tell_from_root(target: str) -> None:
    (user,) = arguments(target, "USER")
    number, group = user.split(":")
    assert int(number) > 0
    (created,) = arguments(target, "RUN")
    assert f"--uid {number} --gid {group}" in created
    words = [word for word, _ in stages()[target]]
    assert words.index("RUN") < words.index("USER") < words.index("ENTRYPOINT")
    assert not [word for word in words[words.index("USER") :] if word in ("RUN", "COPY", "ADD")]


@targets
def test_what_builds_stays_behind(target: str) -> None:
    """The last stage takes the environment alone from the one that made it; a compiler is there for Triton only."""
    assert arguments(target, "FROM") == [f"{target}-system AS {target}"]
    copied = arguments(target, "COPY")
    assert [each for each in copied if each.startswith("--from")] == [
        f"--from={target}-build /opt/peregrine/.venv /opt/peregrine/.venv"
    ]
    installed = " ".join(arguments(f"{target}-system", "RUN"))
    assert ("gcc" in installed) == (target == "gpu")
    assert "python3-venv" not in installed
    assert "rm -rf /var/lib/apt/lists" in installed


@targets
def test_versions_are_those_that_were_tested(target: str) -> None:
    installs = [run for run in arguments(f"{target}-build", "RUN") if "pip install" in run]
    assert "--constraint constraints.txt" in installs[0]
    assert all("--constraint" in run or "--no-deps" in run for run in installs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "gpu" in extras


@pytest.mark.parametrize(("target", "requirement"), [("gpu", ".[gpu,tracing]"), ("cpu", ".[tracing]")])
def test_torch_comes_from_its_cpu_index_only_where_no_gpu_is(target: str, requirement: str) -> None:
    """The build's own shell command runs here, with a pip that only says what it was asked for."""
    install = next(run for run in arguments(f"{target}-build", "RUN") if "pip install" in run).partition("&& cd")[0]
    script = f'python3() {{ :; }}; pip() {{ echo "$@"; }}; {install}'
    settings = {"CPU_INDEX": "the-index"}
    ran = subprocess.run(["sh", "-c", script], env=settings, capture_output=True, text=True, check=True)
    *before, last = ran.stdout.splitlines()
    assert requirement in last.split()
    assert ["--index-url the-index torch" in line for line in before] == ([True] if target == "cpu" else [])


@targets
def test_a_container_is_replaced_when_it_is_dead_and_not_while_it_restarts_its_engine(target: str) -> None:
    (check,) = arguments(target, "HEALTHCHECK")
    assert json.loads(check.partition(" CMD ")[2]) == ["python3", "-m", "server.cli.health"]
    assert arguments(target, "EXPOSE") == ["8000"]


@targets
def test_all_that_is_written_lies_in_the_one_volume(target: str) -> None:
    assert arguments(target, "VOLUME") == ["/cache"]
    settings = " ".join(arguments(target, "ENV"))
    names = ["PEREGRINE_CACHE", "HF_HOME", "XDG_STATE_HOME", *(["TRITON_CACHE_DIR"] if target == "gpu" else [])]
    assert all(f"{name}=/cache/" in settings for name in names)


@targets
def test_settings_of_the_image_are_those_for_production_and_hold_for_any_command(target: str) -> None:
    settings = " ".join(arguments(target, "ENV"))
    file = re.search(r"PEREGRINE_CONFIG=/opt/peregrine/(\S+)", settings)[1]
    assert arguments(target, "COPY")[-1] == "configs /opt/peregrine/configs"
    server = load_config([read_file(ROOT / file)]).config.server
    assert (server.host, server.port) == ("0.0.0.0", 8000)
    assert server.drain_delay > 0


@targets
def test_signals_reach_the_server(target: str) -> None:
    """Its first process is one that passes them on from its first millisecond."""
    assert json.loads(arguments(target, "ENTRYPOINT")[0]) == ["tini", "--", "peregrine"]
    assert json.loads(arguments(target, "CMD")[0])[:1] == ["serve"]
    assert arguments(target, "STOPSIGNAL") == ["SIGTERM"]
    assert all("tini" in run for run in arguments(f"{target}-system", "RUN"))


def test_all_that_is_copied_exists_and_is_sent_to_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copies = [rest for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    copied = {source for copy in copies for source in copy.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def grace_holds(seconds: float) -> bool:
    server = load_config([read_file(ROOT / "configs" / "production.yaml")]).config.server
    return seconds > server.drain_delay + server.shutdown_timeout


@pytest.mark.parametrize("name", ["server", "server-gpu"])
def test_a_composed_server_may_write_nowhere_but_to_its_volume_and_is_given_time_to_end(services: dict, name) -> None:
    server = services[name]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["volumes"] == ["cache:/cache"]
    assert server["build"]["target"] == ("gpu" if name == "server-gpu" else "cpu")
    assert server["healthcheck"]["test"][-2:] == ["server.cli.health", "--ready"]
    assert DEFAULT_MODEL in " ".join(server["command"])
    assert grace_holds(int(server["stop_grace_period"].removesuffix("s")))
    assert "ports" not in server, "a second replica would find the port taken"


def test_a_gpu_is_asked_for_by_its_own_profile_and_answers_to_the_same_name(services: dict) -> None:
    assert "profiles" not in services["server"]
    gpu = services["server-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert gpu["networks"]["default"]["aliases"] == ["server"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_images_are_pinned_and_files_are_there(services: dict) -> None:
    optional = {name for name, service in services.items() if "profiles" in service}
    assert set(services) - optional == {"server", "haproxy"}
    for service in services.values():
        assert IMAGE_TAG.fullmatch(service["image"])
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (ROOT / source).is_file()


def test_who_is_in_front_and_who_scrapes_find_every_replica_by_name(services: dict) -> None:
    haproxy = (ROOT / "configs" / "balancers" / "haproxy.cfg").read_text()
    assert re.search(r"presetenv PEREGRINE_REPLICAS (\S+)", haproxy)[1] in services
    assert "server server:8000 resolve" in (ROOT / "configs" / "balancers" / "nginx-upstream.conf").read_text()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (discovery,) = jobs["peregrine"]["dns_sd_configs"]
    assert (discovery["names"], discovery["type"], discovery["port"]) == (["server"], "A", 8000)
    named = [jobs["haproxy"]["static_configs"][0], config["alerting"]["alertmanagers"][0]["static_configs"][0]]
    assert all(target.partition(":")[0] in services for each in named for target in each["targets"])
    (source,) = yaml.safe_load((MONITORING / "datasource.yml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").partition(":")[0] in services
    assert any(part.startswith("--storage.tsdb.retention.time=") for part in services["prometheus"]["command"])


def test_a_pod_is_unprivileged_asked_by_all_three_probes_and_given_time_to_end() -> None:
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/startupz", "liveness": "/livez", "readiness": "/readyz"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == arguments("cpu", "USER")[0]
    )
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", "/tmp"}
    assert grace_holds(pod["terminationGracePeriodSeconds"])
    assert "command" not in container, "the image's first process is the one that passes signals on"


def test_a_cluster_finds_what_it_is_told_to_find() -> None:
    labels = kubernetes("Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        kubernetes("Deployment")["spec"]["selector"]["matchLabels"],
        kubernetes("Service")["spec"]["selector"],
        kubernetes("PodMonitor")["spec"]["selector"]["matchLabels"],
        kubernetes("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    (endpoint,) = kubernetes("PodMonitor")["spec"]["podMetricsEndpoints"]
    (container,) = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"]
    assert endpoint["port"] == container["ports"][0]["name"]
    (metric,) = kubernetes("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {family.full_name for family in FAMILIES}


def test_a_service_of_systemd_has_time_to_end_and_is_not_started_again_in_vain() -> None:
    lines = (ROOT / "configs" / "systemd" / "peregrine.service").read_text().splitlines()
    unit = dict(line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#"))
    assert grace_holds(int(unit["TimeoutStopSec"]))
    assert {"2", "3", "4"} == set(unit["RestartPreventExitStatus"].split())
    assert unit["KillMode"] == "mixed"
