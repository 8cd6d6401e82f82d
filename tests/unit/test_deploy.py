"""The files in ``deploy/``, as far as they can be checked without a container engine, and what the image starts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_pydantic.models import ComposeSpecification
from dockerfile_parse import DockerfileParser

from blipstream.config import PREFIX, ServerConfig
from blipstream.errors import EngineError
from blipstream.manifest import PlanSection
from blipstream.triton import container
from blipstream.triton.container import DRAIN_S, check_tensorrt, installed_tensorrt, main, server_command
from blipstream.triton.installation import Installation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def dockerfile() -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO((DEPLOY / "Dockerfile").read_bytes()))


@pytest.fixture(scope="module")
def instructions(dockerfile: DockerfileParser) -> list[tuple[str, str]]:
    return [
        (entry["instruction"], entry["value"]) for entry in dockerfile.structure if entry["instruction"] != "COMMENT"
    ]


def values(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [value for instruction, value in instructions if instruction == name]


# --- the image ---------------------------------------------------------------------------------------------------


def test_every_instruction_is_one_of_docker(instructions: list[tuple[str, str]]) -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {instruction for instruction, _ in instructions} == known


def test_both_stages_are_the_release_that_was_asked_for(dockerfile: DockerfileParser) -> None:
    assert dockerfile.structure[0]["instruction"] == "COMMENT"
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["nvcr.io/nvidia/tritonserver:${TRITON_TAG}"] * 2
    assert re.findall(r"^ARG (.*)$", text, re.M) == ["TRITON_TAG"], "it has no default"


def copied(instructions: list[tuple[str, str]]) -> list[str]:
    """Sources of COPY within the build context."""
    return [source for value in values(instructions, "COPY") if "--from" not in value for source in value.split()[:-1]]


def test_what_is_copied_exists_and_reaches_the_build(instructions: list[tuple[str, str]]) -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sources = copied(instructions)
    assert len(sources) > 5
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == set(sources)


def test_what_the_wheel_is_made_of_is_copied(instructions: list[tuple[str, str]]) -> None:
    project, wheel = PYPROJECT["project"], PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["readme"], *project["license-files"]]
    assert {Path(path).parts[0] for path in needed} <= set(copied(instructions))


def test_the_extra_that_is_installed_is_one(instructions: list[tuple[str, str]]) -> None:
    extras = set(re.findall(r"\.whl\)\[([\w,]+)\]", " ".join(values(instructions, "RUN"))))
    assert extras == {"models"}
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])
    assert not any("pytriton" in name for name in PYPROJECT["project"]["optional-dependencies"]["models"])


def test_the_server_is_not_root_and_serves_the_mounted_bundle(instructions: list[tuple[str, str]]) -> None:
    names = [instruction for instruction, _ in instructions]
    assert values(instructions, "USER") == ["triton-server"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    entry = yaml.safe_load(values(instructions, "ENTRYPOINT")[0])
    assert entry[:2] == ["python3", "-m"]
    assert importlib.util.find_spec(entry[2]) is not None
    assert values(instructions, "CMD") == ['["/bundle"]']


@pytest.mark.slow
def test_the_copied_files_make_a_wheel_that_has_the_models(instructions: list[tuple[str, str]], tmp_path: Path) -> None:
    """What the first stage does: a wheel of the build context alone."""
    for source in copied(instructions):
        path = REPOSITORY / source
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "blipstream/triton/container.py" in names
    assert "blipstream/model_repository/blip2/config.pbtxt" in names


# --- compose -----------------------------------------------------------------------------------------------------


SERVICES = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module", params=["blipstream", "cpu"])
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = SERVICES[request.param]
    return found


def test_compose_is_one() -> None:
    data = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(ComposeSpecification.model_validate(data).services) == {"blipstream", "cpu"}


def test_compose_builds_this_dockerfile(service: dict[str, Any]) -> None:
    build = service["build"]
    assert (DEPLOY / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]).is_file()
    assert set(build["args"]) == {"TRITON_TAG"}


def test_compose_mounts_the_bundle_for_reading(service: dict[str, Any]) -> None:
    (volume,) = service["volumes"]
    assert (volume["target"], volume["read_only"]) == ("/bundle", True)


def test_compose_publishes_on_the_loopback_address(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert [port.split(":")[2] for port in service["ports"]] == values(instructions, "EXPOSE")[0].split()


def test_compose_reserves_a_gpu_for_one_service() -> None:
    (device,) = SERVICES["blipstream"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert not SERVICES["cpu"]["deploy"]
    assert (SERVICES["cpu"]["profiles"], "profiles" in SERVICES["blipstream"]) == (["cpu"], False)


def test_compose_waits_for_the_drain(service: dict[str, Any]) -> None:
    assert int(service["stop_grace_period"].removesuffix("s")) >= DRAIN_S + 15


def test_compose_sets_what_the_models_read(service: dict[str, Any]) -> None:
    known = {f"{PREFIX}{field.name.upper()}" for field in dataclasses.fields(ServerConfig)}
    assert set(service["environment"]) <= known
    ServerConfig.from_environment(service["environment"])


def test_the_health_check_is_a_program(service: dict[str, Any]) -> None:
    kind, program, option, code = service["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python3", "-c")
    compile(code, "healthcheck", "exec")
    assert "/v2/health/ready" in code


# --- what the image starts ---------------------------------------------------------------------------------------


def test_the_flags_are_those_of_tritonserver() -> None:
    installation = Installation.find()
    done = subprocess.run(
        [installation.binary, "--help"], env=installation.environment(1), capture_output=True, text=True, check=False
    )
    known = set(re.findall(r"^\s*(--[\w-]+)", done.stdout + done.stderr, re.M))
    assert len(known) > 40
    used = {argument.partition("=")[0] for argument in server_command(Path("/bundle")) if argument.startswith("--")}
    assert used <= known


def test_options_come_last() -> None:
    assert server_command(Path("/b"), ["--log-verbose=1"])[-1] == "--log-verbose=1"


PLANS = PlanSection(
    tensorrt="11.4.0.106",
    gpu="NVIDIA H100",
    compute_capability="9.0",
    version_compatible=False,
    hardware="none",
    plugins=False,
    seconds={},
)
COMPATIBLE = PLANS.model_copy(update={"version_compatible": True})


@pytest.mark.parametrize(
    ("plans", "here"),
    [(None, None), (PLANS, "11.4.0.106"), (COMPATIBLE, "11.4.1.2"), (COMPATIBLE, "11.10.0.1")],
)
def test_engines_that_load(plans: PlanSection | None, here: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "installed_tensorrt", lambda _library: here)
    check_tensorrt(plans)


@pytest.mark.parametrize(
    ("plans", "here", "said"),
    [
        (PLANS, None, "need TensorRT 11.4.0.106, but there is no libnvinfer.so.11 in this container"),
        (PLANS, "11.4.1.2", "built with TensorRT 11.4.0.106 and need that very version, but this is TensorRT 11.4.1.2"),
        (COMPATIBLE, "11.3.0.9", "need that version or a later one, but this is TensorRT 11.3.0.9"),
        (COMPATIBLE, "12.0.0.1", "but this is TensorRT 12.0.0.1"),
    ],
)
def test_engines_that_do_not(plans: PlanSection, here: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "installed_tensorrt", lambda _library: here)
    with pytest.raises(EngineError, match=re.escape(said)):
        check_tensorrt(plans)


def test_the_version_is_asked_of_a_real_library() -> None:
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-lean-cu13-libs is not installed")
    library = Path(spec.origin).parent / "libnvinfer_lean.so.11"
    assert installed_tensorrt(str(library)) == importlib.metadata.version("tensorrt-lean-cu13-libs")
    assert installed_tensorrt("libnvinfer_of_nobody.so.11") is None


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"blipstream: {tmp_path} is not a bundle")
    assert main([]) == 2
