from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.docker.test_image import DOCKER, rehearse

FOLDER = DOCKER / "kubernetes"
RESOURCES: list[str] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
VERSION = "1.34"
"""The oldest that is still maintained, and the first in which a sleeping preStop is stable."""

NOT_POD_SPEC = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def kserve_pod() -> dict[str, Any]:
    """KServe's predictor is a pod's spec with fields of its own beside it."""
    predictor = load("kserve.yaml")["spec"]["predictor"]
    return {key: value for key, value in predictor.items() if key not in NOT_POD_SPEC}


PODS = {"deployment": load("deployment.yaml")["spec"]["template"]["spec"], "kserve": kserve_pod()}


@pytest.mark.parametrize("name", RESOURCES)
def test_every_resource_keeps_the_schema_of_kubernetes(name: str) -> None:
    kubernetes_validate.validate(load(name), VERSION, strict=True)


def test_the_kserve_predictor_is_a_valid_pod() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hbll"}, "spec": kserve_pod()}
    kubernetes_validate.validate(pod, VERSION, strict=True)


def test_the_schema_check_sees_a_misspelt_field() -> None:
    wrong = load("service.yaml")
    wrong["spec"]["sellector"] = wrong["spec"].pop("selector")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_no_manifest_is_left_out() -> None:
    others = {"kustomization.yaml", "kserve.yaml", "prometheus-adapter.yaml"}
    assert {file.name for file in FOLDER.glob("*.yaml")} == set(RESOURCES) | others


def test_all_select_the_pods_of_the_deployment() -> None:
    labels = load("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert load("deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("service.yaml")["spec"]["selector"] == labels
    assert load("disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("network.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    assert load("autoscaler.yaml")["spec"]["scaleTargetRef"]["name"] == load("deployment.yaml")["metadata"]["name"]


@pytest.mark.parametrize("name", PODS)
class TestPod:
    def test_keeps_the_restricted_profile_with_a_read_only_root(self, name: str) -> None:
        pod, (container,) = PODS[name], PODS[name]["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == rehearse.read_image(DOCKER / "Dockerfile").user
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_gets_no_variables_that_would_stop_the_server(self, name: str) -> None:
        """A Service named hbll would set HBLL_PORT to a URL, which is no port."""
        assert PODS[name]["enableServiceLinks"] is False

    def test_is_given_the_time_to_drain(self, name: str) -> None:
        pod, (container,) = PODS[name], PODS[name]["containers"]
        sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] >= sleep_s + Settings.model_fields["drain_s"].default + 5
        probe = container["readinessProbe"]
        assert sleep_s >= probe["periodSeconds"] * probe["failureThreshold"]

    def test_has_a_core_for_the_event_loop_beside_the_threads(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        threads = {item["name"]: item["value"] for item in container["env"]}["HBLL_THREADS"]
        assert int(threads) + 1 == int(container["resources"]["limits"]["cpu"])

    def test_is_probed_at_routes_and_ports_that_exist(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        routes = yaml.safe_load((Path(DOCKER.parent) / "openapi.yaml").read_text())["paths"]
        (port,) = container["ports"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in routes
            assert asked["port"] in (port["name"], port["containerPort"])
        assert port["containerPort"] == 8000
