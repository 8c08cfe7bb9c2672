"""Autoscalers: frontends by CPU, workers by what the frontends publish of their role (`frontend/scaling.py`)."""

from __future__ import annotations

from dynserve.deploy.cluster import Autoscaling
from dynserve.deploy.objects import Object

CPU_PERCENT = 80


def by_cpu(name: str, minimum: int, maximum: int) -> Object:
    """Returns the spec of a HorizontalPodAutoscaler of frontends."""
    cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": CPU_PERCENT}}
    return _hpa(name, minimum, maximum, [{"type": "Resource", "resource": cpu}])


def by_role(name: str, minimum: int, maximum: int, settings: Autoscaling, cluster: str, role: str) -> Object:
    """Returns the spec of a HorizontalPodAutoscaler of workers. It follows the metric that asks for most.

    A metrics adapter has to serve the metrics as external ones, and of all frontends' series the greatest: Kubernetes would
    add them up, although every frontend publishes the same of the workers.
    """
    wanted = {
        "dynserve_role_kv_occupancy": f"{settings.kv_occupancy_percent * 10}m",
        "dynserve_role_waiting_requests": str(settings.waiting_requests),
        "dynserve_role_queued_requests": str(settings.waiting_requests),
    }
    metrics = [
        {
            "type": "External",
            "external": {
                "metric": {"name": metric, "selector": {"matchLabels": {"cluster": cluster, "role": role}}},
                "target": {"type": "AverageValue", "averageValue": value},
            },
        }
        for metric, value in wanted.items()
    ]
    return _hpa(name, minimum, maximum, metrics) | {"behavior": _slow_scale_down()}


def _slow_scale_down() -> Object:
    """A worker that leaves finishes its answers first: not all at once."""
    return {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}


def _hpa(name: str, minimum: int, maximum: int, metrics: list[Object]) -> Object:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    return {"scaleTargetRef": target, "minReplicas": minimum, "maxReplicas": maximum, "metrics": metrics}


def keda(
    name: str, minimum: int, maximum: int, settings: Autoscaling, cluster: str, role: str, *, objective: bool
) -> Object:
    """Returns the spec of a KEDA ScaledObject of workers. `objective`: the frontends have an objective for TTFT, by which
    the roles that prefill are scaled, too."""
    of_role = f'{{cluster="{cluster}",role="{role}"}}'
    triggers = [
        _trigger(settings, f"max(dynserve_role_kv_occupancy{of_role})", settings.kv_occupancy_percent, "AverageValue"),
        _trigger(
            settings,
            f"max(dynserve_role_waiting_requests{of_role}) + sum(dynserve_role_queued_requests{of_role})",
            settings.waiting_requests * 100,
            "AverageValue",
        ),
    ]
    if objective and role != "decode":
        query = f'max(dynserve_ttft_slo_missed_ratio{{cluster="{cluster}"}})'
        triggers.append(_trigger(settings, query, settings.missed_percent, "Value"))
    return {
        "scaleTargetRef": {"name": name}, "minReplicaCount": minimum, "maxReplicaCount": maximum, "triggers": triggers,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _slow_scale_down()}},
    }  # fmt: skip


def _trigger(settings: Autoscaling, query: str, percent: int, kind: str) -> Object:
    content = {
        "serverAddress": settings.prometheus,
        "query": query,
        "threshold": f"{percent // 100}.{percent % 100:02}",
    }
    return {"type": "prometheus", "metricType": kind, "metadata": content}
