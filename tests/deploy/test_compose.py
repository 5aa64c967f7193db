"""Checks docker-compose.yml and its images without running them; deploy/smoke.sh runs them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = ("head", "worker", "captioner", "trainer")
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").glob("*.sh"))
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GRAFANA_PASSWORD", "PAGE_PASSWORD")


def constraints(name: str) -> dict[str, str]:
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def settings(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def make_env(path: Path) -> None:
    subprocess.run(["sh", str(ROOT / "deploy/make-env.sh"), str(path)], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/smoke.yml"])
def test_the_file_matches_the_compose_specification(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / name)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_ports_are_published_on_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(str(port).startswith("127.0.0.1:") for port in ports), ports
    assert not any(service.get("network_mode") or service.get("privileged") for service in SERVICES.values())


def test_credentials_come_from_the_environment_and_are_required() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("KEY|SECRET|PASSWORD|TOKEN", variable) and value is not None:
                assert re.fullmatch(r"(hdm:)?\$\{\w+:\?[^}]+\}", value), (name, variable)


def test_every_setting_is_described() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    described = settings(ROOT / ".env.example")
    assert used | {"COMPOSE_PROFILES"} == set(described)
    assert [name for name in SECRETS if described[name]] == []
    # Variables without a value in the compose file are unset unless .env sets them.
    passed = {name for name, value in COMPOSE["x-environment"].items() if value is None}
    assert passed == set(re.findall(r"^# (\w+)=$", (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_credentials_are_created_once_and_only_this_user_can_read_them(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make_env(one)
    make_env(other)
    made = settings(one)
    assert one.stat().st_mode & 0o777 == 0o600
    assert all(len(made[name]) >= 20 and made[name] != settings(other)[name] for name in SECRETS)
    assert {k: v for k, v in made.items() if k not in SECRETS} == {
        k: v for k, v in settings(ROOT / ".env.example").items() if k not in SECRETS
    }
    make_env(one)
    assert settings(one) == made


def test_missing_credentials_are_added_to_an_existing_file(tmp_path: Path) -> None:
    make_env(file := tmp_path / "env")
    older = "".join(line for line in file.read_text().splitlines(keepends=True) if "PAGE_PASSWORD" not in line)
    file.write_text(older)
    make_env(file)
    assert file.read_text().startswith(older)
    assert len(settings(file)["PAGE_PASSWORD"]) >= 20


def test_credentials_are_in_no_commit_image_or_upload() -> None:
    # `ray job submit --working-dir .` does not upload what git ignores.
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert "/.env" in ignored
    assert next(line for line in sent if not line.startswith("#")) == "*"
    assert all((ROOT / line[1:]).exists() for line in sent if line.startswith("!"))
    assert "!.env" not in sent


def test_every_image_has_a_fixed_version() -> None:
    images = [service["image"] for service in SERVICES.values()]
    images += re.findall(r"^FROM (\S+:\S+)", DOCKERFILE, re.MULTILINE)
    assert all(re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", image) for image in images), images


def test_images_have_the_projects_version_and_the_name_of_their_build_target() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    built = {service["image"]: service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {f"hdm-{target}:{version}": target for target in ("pipeline", "captioner", "trainer")}
    assert set(built.values()) <= set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))


def test_all_images_have_the_same_python_and_ray() -> None:
    bases = set(re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.MULTILINE))
    assert bases == {"python:3.11-slim-bookworm", "base"}
    # Tasks, actors and tables pass between images.
    one, other = constraints("constraints.txt"), constraints("constraints-captioner.txt")
    for package in (
        "ray",
        "pyarrow",
        "numpy",
        "pandas",
        "pillow",
        "s3fs",
        "aiobotocore",
        "aiohttp",
        "prometheus_client",
    ):
        assert one[package] == other[package], package


def test_the_images_install_the_pinned_versions() -> None:
    setup = (ROOT / "deploy/setup.sh").read_text()
    known = constraints("constraints.txt") | {"vllm": constraints("constraints-captioner.txt")["vllm"]}
    known["pillow-simd"] = re.search(r"^simd=(\S+)", setup, re.MULTILINE).group(1)  # type: ignore[union-attr]
    named = re.findall(r"([\w-]+)==([\w.]+)", DOCKERFILE)
    assert {name for name, _ in named} == {"torch", "vllm", "pillow-simd"}
    assert [(name, version) for name, version in named if known[name] != version] == []
    assert all(" -c deploy/constraints" in line or "--no-deps" in line for line in _pip_installs()), _pip_installs()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for asked in re.findall(r"install-dependencies\.sh deploy/constraints[\w-]*\.txt(.*)", DOCKERFILE):
        assert set(asked.split()) <= set(extras)


def _pip_installs() -> list[str]:
    return re.findall(r"pip install .*|pip wheel .*", DOCKERFILE)


def test_no_container_runs_as_root_or_gains_privileges() -> None:
    for target in ("pipeline", "trainer", "captioner", "s3"):
        stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert stage.strip().splitlines()[-1] == "USER hdm", target
    for name in (name for name, service in SERVICES.items() if "build" in service):
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


def test_the_nodes_share_a_token_that_only_the_head_can_write() -> None:
    assert SERVICES["head"]["volumes"][0] == "token:/home/hdm/.ray"
    for name in NODES[1:]:
        assert SERVICES[name]["volumes"][0] == "token:/home/hdm/.ray:ro"
    assert all(SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token" for name in NODES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_and_restarts(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] in ("unless-stopped", "on-failure")
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["logging"]["options"]["max-size"]
    # A service that ends by itself needs no health check.
    assert "healthcheck" in service or service["restart"] == "on-failure"


def test_only_gpu_services_request_gpus() -> None:
    def devices(service: dict[str, Any]) -> Any:
        return service["deploy"]["resources"].get("reservations", {}).get("devices")

    asking = {name for name, service in SERVICES.items() if devices(service)}
    assert asking == {name for name, service in SERVICES.items() if "gpu" in service.get("profiles", ())}
    assert asking == {"captioner", "trainer"}


def test_mounted_files_and_volumes_exist() -> None:
    mounted = [volume for service in SERVICES.values() for volume in service.get("volumes", ())]
    named = {volume.split(":")[0] for volume in mounted if not volume.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    for path in (volume.split(":")[0] for volume in mounted if volume.startswith(".")):
        assert (ROOT / path).exists(), path


def test_the_page_needs_a_password_and_prometheus_scrapes_it() -> None:
    assert "HDM_PAGE_PASSWORD" in SERVICES["page"]["environment"]
    assert "trainer web" in DOCKERFILE.split(" AS pipeline\n")[1].split("\nFROM ")[0]
    jobs = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())["scrape_configs"]
    asked = {(target["names"][0], target["port"]) for job in jobs for target in job.get("dns_sd_configs", ())} | {
        (target.split(":")[0], int(target.split(":")[1]))
        for job in jobs
        for static in job.get("static_configs", ())
        for target in static["targets"]
    }
    assert asked == {("page", 7860), ("exporter", 9405)}
    for name, port in asked:
        assert SERVICES[name]["command"][-1] == str(port)


def test_a_dataset_on_disk_needs_no_bucket() -> None:
    command = [sys.executable, "deploy/make_bucket.py", "/data/dataset"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "make_bucket: /data/dataset needs no bucket\n"), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_no_syntax_errors(script: str) -> None:
    checked = subprocess.run(["sh", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_smoke_test_is_executable() -> None:
    assert os.access(ROOT / "deploy/smoke.sh", os.X_OK)
