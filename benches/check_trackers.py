"""Compares what TensorBoard, MLflow and Trackio read of a run with its metrics.jsonl; see trackers.sh.

usage: check_trackers.py RUN
"""
import json, math, os, sys
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackio.remote_client import RemoteClient

run = sys.argv[1]
lines = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
steps = {line["step"]: line for line in lines if "loss" in line}
evals = {line["step"]: line for line in lines if "eval_loss" in line}
expected = {
    "train/loss": {step: line["loss"] for step, line in steps.items()},
    "train/grad_norm": {step: line["grad_norm"] for step, line in steps.items()},
    "train/learning_rate": {step: line["learning_rate"] for step, line in steps.items()},
    "eval/loss": {step: line["eval_loss"] for step, line in evals.items()},
    "eval/accuracy": {step: line["eval_accuracy"] for step, line in evals.items()},
    "eval/perplexity": {step: line["eval_perplexity"] for step, line in evals.items()},
}


def compare(what, name, found):
    assert found.keys() == expected[name].keys(), (what, name, sorted(found), sorted(expected[name]))
    for step, value in found.items():
        # TensorBoard's values have 32 bits.
        assert math.isclose(value, expected[name][step], rel_tol=1e-6), (what, name, step, value, expected[name][step])


accumulator = EventAccumulator(os.path.join(run, "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
accumulator.Reload()
for name in expected:
    events = accumulator.Scalars(name)
    assert len(events) == len(expected[name]), (name, "a step twice", [event.step for event in events])
    compare("tensorboard", name, {event.step: event.value for event in events})
texts = {event.step: event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors("answers/1")}
# TensorBoard drops scalars behind a restart, and keeps texts.
assert texts.keys() >= evals.keys() and all("What is 2 + 3?" in text for text in texts.values()), texts
print(f"tensorboard: {len(expected)} scalars over {len(steps)} steps, answers at {sorted(texts)}, no step twice")

client = MlflowClient()
experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
runs = client.search_runs([experiment.experiment_id])
assert len(runs) == 1, f"a resumed run is the same run: {runs}"
found = runs[0]
assert found.info.status == "FINISHED" and found.data.params["train.learning_rate"], found
for name in expected:
    history = client.get_metric_history(found.info.run_id, name)
    # Of steps that were done again the later value counts; MLflow keeps what lay behind the checkpoint, an evaluation at the first end.
    history = sorted((metric for metric in history if metric.step in expected[name]), key=lambda metric: metric.timestamp)
    compare("mlflow", name, {metric.step: metric.value for metric in history})
assert "What is 2 + 3?" in found.data.tags["answers/1"], found.data.tags
print(f"mlflow: one run, {found.info.status}, {len(found.data.params)} parameters, {len(expected)} metrics over {len(steps)} steps")

project = os.environ["TRACKIO_PROJECT"]
client = RemoteClient(os.environ["TRACKIO_SERVER_URL"])
runs = client.predict(api_name="/get_runs_for_project", project=project)
assert len(runs) == 1, f"a resumed run is the same run: {runs}"
of_run = {"project": project, "run": runs[0]["name"], "run_id": runs[0]["id"]}
config = client.predict(api_name="/get_run_configs", project=project)[runs[0]["id"]]
assert config["train.log_to"] == ["tensorboard", "mlflow", "trackio"] and config["train.learning_rate"] > 0, config
entries = client.predict(api_name="/get_logs", **of_run)
for name in expected:
    history = [(entry["step"], entry[name]) for entry in entries if name in entry]
    assert len(dict(history)) == len(history), (name, "a step twice", history)
    # An evaluation at the first end is no part of the whole run.
    compare("trackio", name, {step: value for step, value in history if step in expected[name]})
traces = client.predict(api_name="/get_traces", **of_run)
assert {trace["step"] for trace in traces} >= evals.keys() and len({trace["step"] for trace in traces}) == len(traces), traces
assert all(trace["messages"][0]["content"] == "What is 2 + 3?" for trace in traces), traces
print(f"trackio: one run, {len(config)} settings, {len(expected)} metrics over {len(steps)} steps, {len(traces)} answers, no step twice")
