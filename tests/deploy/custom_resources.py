"""Schemas of the custom resources, which kubernetes-validate does not hold.

They are no copies of the definitions that a cluster has: they hold the fields that k8s/ uses, with their types, and
those that the definitions require. So a misspelt or misplaced field is found, and one that is used newly must be added
here. What the definitions take over from Kubernetes' own kinds, a pod or a scaling behaviour, is checked as such.
"""

from typing import Any

Schema = dict[str, Any]


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Schema:
    properties = required | (optional or {})
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _custom(api_version: str, kind: str, spec: Schema) -> Schema:
    metadata = _object({"name": TEXT}, {"namespace": TEXT, "labels": TEXTS, "annotations": TEXTS})
    return _object({"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


ANY: Schema = {}
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}

_ENDPOINT = _object({"port": TEXT}, {"path": TEXT, "interval": DURATION, "scrapeTimeout": DURATION})
_SERVICE_MONITOR = _object(
    {"selector": _object({"matchLabels": TEXTS}), "endpoints": _list(_ENDPOINT)}, {"jobLabel": TEXT}
)

_RECORD = _object({"record": TEXT, "expr": TEXT}, {"labels": TEXTS})
_ALERT = _object(
    {"alert": TEXT, "expr": TEXT},
    {"for": DURATION, "keep_firing_for": DURATION, "labels": TEXTS, "annotations": TEXTS},
)
_GROUP = _object({"name": TEXT, "rules": _list({"oneOf": [_RECORD, _ALERT]})}, {"interval": DURATION, "limit": COUNT})
_PROMETHEUS_RULE = _object({"groups": _list(_GROUP)})

_PROMETHEUS_TRIGGER = _object(
    {
        "type": {"const": "prometheus"},
        "metricType": {"enum": ["AverageValue", "Value"]},
        # KEDA reads numbers and truths out of strings here, and takes nothing else.
        "metadata": _object({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT}, {"ignoreNullValues": TEXT}),
    }
)
_CPU_TRIGGER = _object(
    {
        "type": {"const": "cpu"},
        "metricType": {"enum": ["AverageValue", "Utilization"]},
        "metadata": _object({"value": TEXT}),
    }
)
_SCALED_OBJECT = _object(
    {
        "scaleTargetRef": _object({"apiVersion": TEXT, "kind": TEXT, "name": TEXT}),
        "triggers": _list({"oneOf": [_PROMETHEUS_TRIGGER, _CPU_TRIGGER]}),
    },
    {
        "minReplicaCount": COUNT,
        "maxReplicaCount": COUNT,
        "pollingInterval": COUNT,
        "advanced": _object({"horizontalPodAutoscalerConfig": _object({"behavior": ANY})}),
    },
)

_PREDICTOR = {
    "minReplicas": COUNT,
    "maxReplicas": COUNT,
    "scaleMetric": {"enum": ["cpu", "memory"]},
    "scaleTarget": COUNT,
    "deploymentStrategy": ANY,  # a Deployment's
}
KSERVE_FIELDS = frozenset(_PREDICTOR)  # the predictor's others are a pod's
# One container, of this name: KServe finds the one that serves by it.
_CONTAINER = {"type": "object", "properties": {"name": {"const": "kserve-container"}}}
_INFERENCE_SERVICE = _object(
    {
        "predictor": {
            "type": "object",
            "required": ["containers", *_PREDICTOR],
            "properties": _PREDICTOR | {"containers": _list(_CONTAINER) | {"maxItems": 1}},
        }
    }
)

SCHEMAS = {
    "ServiceMonitor": _custom("monitoring.coreos.com/v1", "ServiceMonitor", _SERVICE_MONITOR),
    "PrometheusRule": _custom("monitoring.coreos.com/v1", "PrometheusRule", _PROMETHEUS_RULE),
    "ScaledObject": _custom("keda.sh/v1alpha1", "ScaledObject", _SCALED_OBJECT),
    "InferenceService": _custom("serving.kserve.io/v1beta1", "InferenceService", _INFERENCE_SERVICE),
}


def standard_parts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a custom resource is one of Kubernetes' own kinds inside, as manifests of these kinds."""
    spec, name = manifest["spec"], {"name": manifest["metadata"]["name"]}
    if manifest["kind"] == "ScaledObject":
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        scaler = {"scaleTargetRef": spec["scaleTargetRef"], "maxReplicas": 1, "behavior": behavior}
        return [{"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": name, "spec": scaler}]
    if manifest["kind"] == "InferenceService":
        labels = manifest["metadata"]["labels"]
        pod = {field: value for field, value in spec["predictor"].items() if field not in KSERVE_FIELDS}
        deployment = {
            "selector": {"matchLabels": labels},
            "strategy": spec["predictor"]["deploymentStrategy"],
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        return [{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": name, "spec": deployment}]
    return []
