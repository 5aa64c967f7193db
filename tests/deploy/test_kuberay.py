"""The manifests of deploy/kuberay are valid, secure, and consistent with the images."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from captioner.prompt_layout import detect_layout

Definition = Callable[[str], jsonschema.Draft7Validator]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
FILES = {"RayCluster": ["raycluster"], "RayJob": ["rayjob-caption", "rayjob-caption-vllm", "rayjob-train"]}
RAY_FILES = [(kind, name) for kind, names in FILES.items() for name in names]
# A group works only with its image.
IMAGE_OF_GROUP = {"head": "pipeline", "cpu": "pipeline", "captioner": "captioner", "trainer": "trainer"}


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def _spec(name: str) -> dict[str, Any]:
    [manifest] = _documents(name)
    return manifest["spec"]


def _cluster(name: str) -> dict[str, Any] | None:
    """The cluster that a manifest defines, or None if it refers to one."""
    spec = _spec(name)
    return spec if name == "raycluster" else spec.get("rayClusterSpec")


CLUSTERS = [name for _, name in RAY_FILES if _cluster(name)]


def _groups(name: str) -> dict[str, dict[str, Any]]:
    cluster = _cluster(name)
    assert cluster
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def _pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pods that a manifest starts, with the names of their groups."""
    if _cluster(name):
        yield from ((group, settings["template"]["spec"]) for group, settings in _groups(name).items())
    if "submitterPodTemplate" in _spec(name):
        yield "submitter", _spec(name)["submitterPodTemplate"]["spec"]


ALL_PODS = [pytest.param(pod, id=f"{name}-{group}") for _, name in RAY_FILES for group, pod in _pods(name)]


def _environment(pod: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value") for variable in pod["containers"][0].get("env", [])}


# --- Definitions of KubeRay -------------------------------------------------------------------------------------------


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as a JSON schema that refuses unknown fields, like the API server under strict validation."""
    closed = dict(schema)
    if closed.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        closed["properties"] = {name: _closed(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            closed[part] = _closed(schema[part])
    return closed


@pytest.fixture(scope="session")
def definition(kuberay_definitions: Path) -> Definition:
    """definition("RayJob") returns a validator for RayJobs."""

    @cache
    def load(kind: str) -> jsonschema.Draft7Validator:
        path = kuberay_definitions / f"ray.io_{kind.lower()}s.yaml"
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the pure Python loader takes half a minute
        definition = yaml.load(path.read_text(), Loader=loader)
        [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schema = _closed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}  # defined by Kubernetes
        return jsonschema.Draft7Validator(schema)

    return load


@pytest.mark.parametrize(("kind", "name"), RAY_FILES)
def test_the_manifest_matches_kuberays_definition(definition: Definition, kind: str, name: str) -> None:
    [manifest] = _documents(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert [f"{error.json_path}: {error.message}" for error in definition(kind).iter_errors(manifest)] == []


@pytest.mark.parametrize("path", ["spec", "spec.headGroupSpec", "spec.workerGroupSpecs.0.template.spec.containers.0"])
def test_a_misspelt_field_is_found(definition: Definition, path: str) -> None:
    [manifest] = _documents("raycluster")
    part: Any = manifest
    for step in path.split("."):
        part = part[int(step)] if step.isdigit() else part[step]
    part["replica"] = 1
    [error] = definition("RayCluster").iter_errors(manifest)
    assert "'replica' was unexpected" in error.message


# --- The images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-captioner.txt"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_the_ray_version_equals_that_of_the_images(name: str, constraints: str) -> None:
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "deploy" / constraints).read_text(), re.MULTILINE)
    cluster = _cluster(name)
    assert cluster
    assert cluster["rayVersion"] == pinned


@pytest.mark.parametrize("name", [name for _, name in RAY_FILES])
def test_each_group_has_its_image_in_the_projects_version(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for group, pod in _pods(name):
        target = IMAGE_OF_GROUP.get(group, "pipeline")
        assert [container["image"] for container in pod["containers"]] == [f"hdm-{target}:{version}"], group


def test_the_dockerfile_has_the_images_and_their_user() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert set(IMAGE_OF_GROUP.values()) <= set(re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE))
    assert re.search(r"useradd .*--uid 1000\b", dockerfile)  # runAsUser of every pod


@pytest.mark.parametrize("name", [name for name in CLUSTERS if name != "raycluster"])
def test_a_temporary_cluster_has_the_groups_of_the_permanent_one(name: str) -> None:
    shared, groups = _groups("raycluster"), _groups(name)
    here, there = (found.pop("head")["template"]["spec"] for found in (groups, shared))
    assert _environment(here).items() <= _environment(there).items()  # a job has no settings of other jobs
    assert here["containers"][0]["resources"] == there["containers"][0]["resources"]
    for group, settings in groups.items():
        different = {key for key in settings if settings[key] != shared[group].get(key)}
        assert different <= {"replicas"}, group


# --- The jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "command"),
    [("rayjob-caption", "python pipeline/caption.py"), ("rayjob-train", "python trainer/run.py --stage 1024")],
)
def test_the_entry_point_is_the_documented_command(name: str, command: str) -> None:
    assert _spec(name)["entrypoint"] == command


@pytest.mark.parametrize(
    ("name", "group", "script"),
    [("rayjob-caption-vllm", "captioner", "pipeline/caption.py"), ("rayjob-train", "trainer", "trainer/run.py")],
)
def test_the_group_offers_the_resource_that_the_job_asks_for(name: str, group: str, script: str) -> None:
    assert script in _spec(name)["entrypoint"]
    assert "entrypointResources" not in _spec(name)  # the driver runs on the head
    # KubeRay puts the value into a shell command, in which the JSON must be one word.
    [offered] = shlex.split(_groups(name)[group]["rayStartParams"]["resources"])
    assert yaml.safe_load(offered) == {group: 1}
    assert _groups(name)[group]["replicas"] >= 1


@pytest.mark.parametrize("name", ["raycluster", "rayjob-caption-vllm"])
def test_the_driver_knows_a_model_with_fp8_weights(name: str) -> None:
    model = _environment(_groups(name)["head"]["template"]["spec"])["HDM_CAPTION_MODEL"]
    assert "fp8" in model.lower()
    assert detect_layout(model).kind == "hf"
    settings = (ROOT / ".env.example").read_text().splitlines()
    assert f"HDM_CAPTION_MODEL={model}" in settings


def test_a_job_for_the_permanent_cluster_names_it() -> None:
    [cluster] = _documents("raycluster")
    assert _spec("rayjob-caption")["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@pytest.mark.parametrize("name", ["raycluster", "rayjob-train"])
def test_driver_and_workers_of_a_training_share_the_run_folder(name: str) -> None:
    head, trainer = (_groups(name)[group]["template"]["spec"] for group in ("head", "trainer"))
    assert head["volumes"] == trainer["volumes"]
    assert head["containers"][0]["volumeMounts"] == trainer["containers"][0]["volumeMounts"]
    shared = {"HDM_RUN", "HDM_WORKERS", "HF_HOME"}
    assert all(_environment(head)[variable] == _environment(trainer)[variable] for variable in shared)
    [claim] = (claim for claim in _documents("namespace") if claim["metadata"]["name"] == "hdm-run")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob-train"])
def test_a_training_has_a_worker_per_gpu_of_one_node(name: str) -> None:
    group = _groups(name)["trainer"]
    [container] = group["template"]["spec"]["containers"]
    environment = _environment(group["template"]["spec"])
    assert group["maxReplicas"] == 1
    assert container["resources"]["limits"]["nvidia.com/gpu"] == environment["HDM_WORKERS"] == "4"
    [mount] = container["volumeMounts"]
    assert environment["HDM_RUN"].startswith(f"{mount['mountPath']}/")


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_are_released(name: str) -> None:
    if name == "raycluster":
        with_gpus = [group for group in _groups(name).values() if "nvidia.com/gpu" in str(group["template"])]
        assert [group["replicas"] for group in with_gpus] == [0, 0]
    else:
        assert _spec(name)["shutdownAfterJobFinishes"]


# --- Security ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", ALL_PODS)
def test_a_pod_meets_the_restricted_security_standard(pod: dict[str, Any]) -> None:
    """Kubernetes' Pod Security Standards, "restricted"."""
    of_pod = pod["securityContext"]
    assert of_pod["runAsNonRoot"]
    assert of_pod["runAsUser"] == 1000
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(volume.keys() <= {"name", "persistentVolumeClaim"} for volume in pod.get("volumes", []))
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("pod", ALL_PODS)
def test_a_pod_has_limits(pod: dict[str, Any]) -> None:
    for container in pod["containers"]:
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        assert {"cpu", "memory"} <= resources["requests"].keys()


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_requires_the_token_and_is_not_exposed(name: str) -> None:
    cluster = _cluster(name)
    assert cluster
    assert cluster["authOptions"] == {"mode": "token", "secretName": "hdm-ray-token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False


def test_the_namespace_admits_no_root_and_no_traffic_from_outside() -> None:
    documents = {document["kind"]: document for document in _documents("namespace")}
    assert documents["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {}
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule.get("from") for rule in policy["ingress"])
    assert not any("ipBlock" in source for rule in policy["ingress"] for source in rule["from"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_manifest_holds_a_secret(path: Path) -> None:
    """S3 settings and the token come from Secrets; only these environment variables have values."""
    plain = {"RAY_JOB_STOP_WAIT_TIME_S", "HDM_CAPTION_MODEL", "HF_HOME", "HDM_RUN", "HDM_WORKERS"}
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(document["kind"] != "Secret" for document in documents)
    for pod in (pod for _, name in RAY_FILES if name == path.stem for _, pod in _pods(name)):
        assert _environment(pod).keys() <= plain
        assert pod["containers"][0].get("envFrom", []) in ([], [{"secretRef": {"name": "hdm-s3"}}])


@pytest.mark.parametrize("name", [name for _, name in RAY_FILES])
def test_disks_and_namespace_are_defined_in_namespace_yaml(name: str) -> None:
    first = _documents("namespace")
    claims = {document["metadata"]["name"] for document in first if document["kind"] == "PersistentVolumeClaim"}
    used = {volume["persistentVolumeClaim"]["claimName"] for _, pod in _pods(name) for volume in pod.get("volumes", [])}
    assert used <= claims
    [manifest] = _documents(name)
    assert manifest["metadata"]["namespace"] == first[0]["metadata"]["name"]
