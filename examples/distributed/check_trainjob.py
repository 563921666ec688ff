"""Checks trainjob.yaml against Kubeflow's trainer:

    pip install kubeflow-trainer-api jsonschema pyyaml
    python check_trainjob.py [trainer.kubeflow.org_trainjobs.yaml]

The API's classes (PyPI) must read every key of it and give it back; the schema of the custom resource, which is in the trainer's repository
under manifests/base/crds, is stricter and checks names and patterns, too. What only a cluster knows, it does not check.
"""

import pathlib
import sys

import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

job = yaml.safe_load(pathlib.Path(__file__).with_name("trainjob.yaml").read_text())


def missing(wanted, found, path="trainjob.yaml"):
    """Paths of what was written and is not in what came back."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if not isinstance(found, dict) or key not in found:
                yield f"{path}.{key}"
            else:
                yield from missing(value, found[key], f"{path}.{key}")
    elif isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            yield path
        else:
            for index, (one, other) in enumerate(zip(wanted, found)):
                yield from missing(one, other, f"{path}[{index}]")
    elif wanted != found and str(wanted) != str(found):
        yield path


lost = list(missing(job, TrainerV1alpha1TrainJob.from_dict(job).to_dict()))
if lost:
    sys.exit("the API does not know: " + ", ".join(lost))
print("the API's classes know every key")

if len(sys.argv) > 1:
    import jsonschema

    def closed(schema):
        """A cluster drops keys that a schema does not name; here they are mistakes."""
        if isinstance(schema, dict):
            if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
                schema.setdefault("additionalProperties", False)
            for value in schema.values():
                closed(value)
        elif isinstance(schema, list):
            for value in schema:
                closed(value)
        return schema

    crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
    for version in crd["spec"]["versions"]:
        if f"{crd['spec']['group']}/{version['name']}" == job["apiVersion"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {"type": "object"}
            jsonschema.validate(job, closed(schema))
            print(f"the schema of {job['apiVersion']} takes it")
            break
    else:
        sys.exit(f"{sys.argv[1]} has no {job['apiVersion']}")
