"""Prints dashboard.json: a Grafana dashboard of Swallow models. Panels are written here once, in the order of a request's life."""

import json

SELECT = 'namespace="$namespace",model=~"$model"'
ROUTERS = 'namespace="$namespace"'
WORKER = 'namespace="$namespace",model_name=~"$model"'


def rate(name, by, select=SELECT):
    return f"sum by ({by}) (rate({name}{{{select}}}[$__rate_interval]))"


def quantiles(name, select=SELECT):
    return [
        (f"histogram_quantile({q}, {rate(name + '_bucket', 'le', select)})", f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99)
    ]


ROWS = [
    ("Clients", [
        ("Requests", "reqps", [(rate("swallow_router_requests_total", "code"), "{{code}}")]),
        ("Open streams", "none", [('sum by (method) (swallow_router_open_streams{namespace="$namespace"})', "{{method}}")]),
        ("Time to first token", "s", quantiles("swallow_router_time_to_first_token_seconds")),
        ("Between tokens", "s", quantiles("swallow_router_inter_token_seconds")),
    ]),
    ("Tokens", [
        ("Output tokens", "none", [(rate("swallow_router_output_tokens_total", "model"), "{{model}}")]),
        ("Prompt tokens", "none", [
            (rate("swallow_router_prompt_tokens_total", "model"), "{{model}}"),
            (rate("swallow_router_cached_tokens_total", "model"), "{{model}}, from the cache"),
        ]),
        ("The router's own time", "s", [
            (f"histogram_quantile(0.99, {rate('swallow_router_overhead_seconds_bucket', 'le, stage', ROUTERS)})", "p99 {{stage}}"),
        ]),
        ("Waiting in routers", "none", [('sum(swallow_router_queue_requests{namespace="$namespace"})', "requests")]),
    ]),
    ("Groups", [
        ("Groups by state", "none", [(f"sum by (state) (swallow_router_replica_state{{{SELECT}}})", "{{state}}")]),
        ("Why a group was chosen", "reqps", [(rate("swallow_router_choices_total", "why"), "{{why}}")]),
        ("Running and waiting sequences", "none", [
            (f"sum by (pod) (vllm:num_requests_running{{{WORKER}}})", "{{pod}} running"),
            (f"sum by (pod) (vllm:num_requests_waiting{{{WORKER}}})", "{{pod}} waiting"),
        ]),
        ("KV cache in use", "percentunit", [(f"max by (pod) (vllm:kv_cache_usage_perc{{{WORKER}}})", "{{pod}}")]),
        ("Time of a step", "s", quantiles("swallow_worker_step_seconds", WORKER)),
        ("Error of a step's predicted time", "percentunit", [
            (f"histogram_quantile(0.9, {rate('swallow_worker_step_prediction_error_bucket', 'le, kind', WORKER)})", "p90 {{kind}}"),
        ]),
        ("Weights loaded", "bytes", [(f"max by (pod) (swallow_worker_load_done_bytes{{{WORKER}}})", "{{pod}}")]),
    ]),
]


def variable(name, query, multi):
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": query,
        "refresh": 2,
        "includeAll": multi,
        "multi": multi,
        "sort": 1,
    }


def panels():
    made, y = [], 0
    for title, row in ROWS:
        made.append({"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        for at, (name, unit, queries) in enumerate(row):
            made.append({
                "type": "timeseries",
                "title": name,
                "datasource": {"type": "prometheus", "uid": "$datasource"},
                "gridPos": {"x": at % 2 * 12, "y": y + 1 + at // 2 * 7, "w": 12, "h": 7},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + nth), "expr": expression, "legendFormat": legend}
                    for nth, (expression, legend) in enumerate(queries)
                ],
            })
        y += 1 + (len(row) + 1) // 2 * 7
    return [{"id": nth, **panel} for nth, panel in enumerate(made, 1)]


dashboard = {
    "uid": "swallow-models",
    "title": "Swallow models",
    "schemaVersion": 39,
    "editable": True,
    "refresh": "30s",
    "time": {"from": "now-1h", "to": "now"},
    "templating": {"list": [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        variable("namespace", "label_values(swallow_router_replica_state, namespace)", False),
        variable("model", 'label_values(swallow_router_replica_state{namespace="$namespace"}, model)', True),
    ]},
    "panels": panels(),
}
print(json.dumps(dashboard, indent=1, ensure_ascii=False))
