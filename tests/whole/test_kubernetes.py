"""The PyTorchJob: its keys are those of the operator's schema, and what it says fits the image and the recipe."""

import os

import yaml
from helpers import ROOT
from helpers.launch import ON_NODE, PYTORCHJOB, call, check_command

from lip_resnet.recipe import load_config

# Every key of the file -> its type or allowed values.
# Source: kubeflow/training-operator, pkg/apis/kubeflow.org/v1, and the Kubernetes pod API.
WORKER = "spec.pytorchReplicaSpecs.Worker"
POD = f"{WORKER}.template.spec"
CONTAINER, VOLUME = f"{POD}.containers[]", f"{POD}.volumes[]"
STRINGS = [
    *("metadata.name", "spec.elasticPolicy.rdzvId", f"{CONTAINER}.image", f"{CONTAINER}.workingDir"),
    *(
        f"{CONTAINER}.command[]",
        f"{CONTAINER}.env[].name",
        f"{CONTAINER}.env[].value",
        f"{CONTAINER}.volumeMounts[].name",
    ),
    *(f"{CONTAINER}.volumeMounts[].mountPath", f"{VOLUME}.name", f"{VOLUME}.emptyDir.sizeLimit"),
    *(f"{VOLUME}.persistentVolumeClaim.claimName", f"{CONTAINER}.resources.requests.cpu"),
    *(f"{CONTAINER}.resources.{kind}.memory" for kind in ("requests", "limits")),
]
INTEGERS = [
    *(f"spec.elasticPolicy.{key}" for key in ("minReplicas", "maxReplicas", "maxRestarts")),
    *("spec.runPolicy.backoffLimit", f"{WORKER}.replicas", f"{POD}.terminationGracePeriodSeconds"),
    *(f"{POD}.securityContext.{key}" for key in ("runAsUser", "fsGroup")),
    *(f"{CONTAINER}.resources.{kind}.nvidia.com/gpu" for kind in ("requests", "limits")),
    f"{CONTAINER}.ports[].containerPort",
]
BOOLEANS = [f"{CONTAINER}.volumeMounts[].readOnly", f"{VOLUME}.persistentVolumeClaim.readOnly"]
KEYS = {
    **{**dict.fromkeys(STRINGS, str), **dict.fromkeys(INTEGERS, int), **dict.fromkeys(BOOLEANS, bool)},
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "spec.runPolicy.cleanPodPolicy": {"All", "Running", "None"},
    "spec.elasticPolicy.rdzvBackend": {"c10d", "etcd", "etcd-v2"},
    f"{WORKER}.restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    f"{CONTAINER}.name": {"pytorch"},
    f"{CONTAINER}.ports[].name": {"pytorchjob-port"},
    f"{VOLUME}.emptyDir.medium": {"Memory"},
}


def leaves(tree: object, path: str = "") -> list[tuple[str, object]]:
    """(path, value) of every value of a YAML tree; those of a list have its path and []."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))]
    return [leaf for item in tree for leaf in leaves(item, f"{path}[]")] if isinstance(tree, list) else [(path, tree)]


def mismatches(tree: object) -> list[object]:
    """Keys that are unknown or missing, and values that are not allowed."""
    given = leaves(tree)
    unknown = set(KEYS) ^ {path for path, _ in given}
    kinds = [(path, value, KEYS[path]) for path, value in given if path in KEYS]
    wrong = [
        item for item in kinds if not (item[1] in item[2] if isinstance(item[2], set) else type(item[1]) is item[2])
    ]
    return [*unknown, *wrong]


def test_pytorchjob_fits_its_schema():
    text = PYTORCHJOB.read_text()
    assert mismatches(yaml.safe_load(text)) == []
    for right, wrong in (
        ("restartPolicy: OnFailure", "restartPolicy: onFailure"),
        ("rdzvBackend: c10d", "rdzvBackend: tcp"),
        ("containerPort:", "containerport:"),
        ('value: "240"', "value: 240"),
        ("replicas: 1\n      restartPolicy", "replicas: one\n      restartPolicy"),
    ):
        assert right in text
        assert mismatches(yaml.safe_load(text.replace(right, wrong))), wrong


def test_pytorchjob_hangs_together(stage, monkeypatch):
    job = yaml.safe_load(PYTORCHJOB.read_text())["spec"]
    worker, policy = job["pytorchReplicaSpecs"]["Worker"], job["elasticPolicy"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ROOT / container["command"][0] == ON_NODE
    assert os.access(ON_NODE, os.X_OK)
    assert call(*container["command"]).returncode == 0
    options, flags = check_command(stage)
    assert (stage / "evaluate").exists()
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    gpus = int(options.nproc_per_node)
    amounts = container["resources"]
    assert amounts["requests"]["nvidia.com/gpu"] == amounts["limits"]["nvidia.com/gpu"] == gpus
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shm"]["mountPath"] == "/dev/shm"
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"WORKDIR {container['workingDir']}\n" in image
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in image
    assert "ENTRYPOINT" not in image
    config = load_config(ROOT / flags["--config"], options.training_script_args[-2:])
    assert config.data.root.startswith(mounts["data"]["mountPath"])
    assert flags["--output"].startswith(mounts["runs"]["mountPath"])
    assert not mounts["runs"].get("readOnly")
    assert gpus * config.data.workers + gpus <= int(amounts["requests"]["cpu"])
