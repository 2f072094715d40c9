"""Do manifests follow the schemas that their kinds are published with? Needs no cluster.

    pip install jsonschema
    python examples/kubernetes/validate.py --schema CRD.yaml ... MANIFEST.yaml ...

CRD.yaml is a CustomResourceDefinition, as in the repositories of JobSet and Kubeflow Trainer:
jobset.x-k8s.io_jobsets.yaml, trainer.kubeflow.org_trainjobs.yaml and ..._trainingruntimes.yaml.
Fields that a schema does not have are errors, which a cluster would only drop. Exit code 1 if
anything is wrong.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Kind = tuple[str, str]  # apiVersion, kind


def schemas(file: Path) -> dict[Kind, dict[str, Any]]:
    """The strict schema of every version of the kind that a file defines."""
    found = {}
    spec = yaml.safe_load(file.read_text())["spec"]
    for version in spec["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
        found[kind] = strict(schema)
    return found


def strict(schema: Any) -> Any:
    """The schema without room for fields that it does not name, where it says so nowhere itself."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get(
        "x-kubernetes-preserve-unknown-fields"
    )
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        return inner if open_ended else {**inner, "additionalProperties": False}
    return inner


def defects(manifest: Path, known: dict[Kind, dict[str, Any]]) -> list[str]:
    """One line each."""
    found = []
    for document in yaml.safe_load_all(manifest.read_text()):
        kind = (document["apiVersion"], document["kind"])
        if kind not in known:
            found.append(f"{manifest}: no schema of {' '.join(kind)} among {sorted(known)}")
            continue
        for error in Draft202012Validator(known[kind]).iter_errors(document):
            where = ".".join(map(str, error.absolute_path))
            found.append(f"{manifest}: {kind[1]}.{where}: {error.message}")
    return found


def main() -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="to look at")
    parser.add_argument(
        "--schema", action="append", required=True, type=Path, metavar="CRD", help="what is allowed"
    )
    options = parser.parse_args()
    known: dict[Kind, dict[str, Any]] = {}
    found = []
    for file in [*options.schema, *options.manifests]:
        try:
            if file in options.schema:
                known |= schemas(file)
            else:
                found += defects(file, known)
        except OSError as error:
            parser.error(f"{file}: {error.strerror}")
        except (yaml.YAMLError, KeyError, TypeError) as error:
            parser.error(f"{file} is no YAML of this kind: {' '.join(str(error).split())[:120]}")
    print(*found or [f"valid: {', '.join(map(str, options.manifests))}"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
