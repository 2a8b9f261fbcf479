from __future__ import annotations

import ast
import csv
import statistics
from pathlib import Path

import pytest

import parallel.plan
from parallel.plan.__main__ import main
from parallel.plan.cases import RowError, case_of
from parallel.plan.rows import COLUMNS, columns_of

MEASURED = Path(__file__).parents[3] / "bench" / "planner"
SAMPLE = {
    "model": "Llama3-70B",
    "gpu": "H100",
    "num_gpus": "64",
    "tp": "4",
    "cp": "2",
    "pp": "4",
    "vp": "5",
    "dp": "2",
    "mbs": "1",
    "gbs": "128",
    "seq": "8192",
    "precision": "bf16",
    "sharding": "zero1",
}


def rows_of(name: str) -> list[dict[str, str]]:
    with (MEASURED / name).open(newline="") as file:
        return list(csv.DictReader(file))


def errors_of(rows: list[dict[str, str]], measured: str, predicted: str) -> list[float]:
    return [float(columns_of(row)[predicted]) / float(row[measured]) - 1 for row in rows if row[measured]]


def mean_absolute(errors: list[float]) -> float:
    return statistics.fmean(map(abs, errors))


def test_published_throughput_is_met():
    rows = rows_of("perf_calibration.csv")
    dense = [row for row in rows if row["sharding"] == "zero1"]
    for chosen, most in ((dense, 0.06), (rows, 0.10)):
        errors = errors_of(chosen, "tokens_per_s_per_gpu", "predicted_tokens_per_s_per_gpu")
        assert mean_absolute(errors) < most
        assert abs(statistics.fmean(errors)) < 0.02


@pytest.mark.parametrize("kind", ["peak", "allocated"])
def test_published_memory_is_met(kind):
    errors = errors_of(rows_of("memory_calibration.csv"), f"mem_{kind}_gib", f"predicted_{kind}_gib")
    assert len(errors) >= 12
    assert mean_absolute(errors) < 0.06


def test_sizes_left_empty_come_from_the_public_configuration():
    full = {**SAMPLE, "params_b": "70.6", "layers": "80", "hidden": "8192", "ffn": "28672", "heads": "64"}
    full |= {"kv_heads": "8", "vocab": "128256"}
    assert columns_of(SAMPLE) == columns_of(full)


@pytest.mark.parametrize("column", [name for name in SAMPLE if name not in ("model", "seq")])
def test_any_field_but_model_and_sequence_may_be_empty_or_absent(column):
    for row in ({**SAMPLE, column: ""}, {key: value for key, value in SAMPLE.items() if key != column}):
        found = columns_of(row)
        assert found["reason"] == ""
        assert float(found["predicted_tokens_per_s_per_gpu"]) > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "MI300X"}, "no facts for GPU 'MI300X'"),
        ({"model": "DeepSeek-V3"}, "not a plain decoder-only transformer"),
        ({"model": "gpt3_moe_mcore_te_tp2"}, "mixture of experts"),
        ({"model": "Unheard-of 12B"}, "layers, hidden, heads of unheard-of 12b not given"),
        ({"params_b": "671"}, "in no column"),
        ({"seq": ""}, "seq is not given"),
        ({"seq": "long"}, "seq is 'long'; it must be a number"),
        ({"mbs": "-1"}, "mbs is -1; it must be above 0"),
        ({"tp": "1.5"}, "tp is 1.5; it must be a whole number"),
        ({"tp": "5"}, "tp x cp x pp x dp = 80 does not divide num_gpus = 64"),
        ({"dp": "1"}, "they must be equal"),
        ({"vp": "40"}, "pp x vp = 160 is more than the 80 layers"),
        ({"precision": "nvfp4"}, "precision 'nvfp4' is not modelled"),
        ({"gpu": "A100", "precision": "fp8"}, "no fp8 tensor cores"),
        ({"sharding": "magic"}, "sharding 'magic' is not known"),
        ({"recompute": "half"}, "recompute 'half' is not known"),
    ],
)
def test_row_that_cannot_be_modelled_says_why(change, reason):
    found = columns_of({**SAMPLE, **change})
    assert reason in found["reason"]
    assert not any(found[name] for name in COLUMNS if name != "reason")


@pytest.mark.parametrize(("column", "axis"), [("tp", "tensor"), ("cp", "context"), ("pp", "pipeline"), ("dp", "data")])
def test_axis_left_empty_follows_from_the_others(column, axis):
    assert getattr(case_of({**SAMPLE, column: ""}).layouts[0], axis) == int(SAMPLE[column])


@pytest.mark.parametrize(
    ("text", "source", "stack", "sharding"),
    [
        ("zero1", "", "megatron", "zero1"),
        ("", "", "megatron", "zero1"),
        ("none", "", "megatron", "none"),
        ("fsdp", "LLM-Foundry", "fsdp", "zero3"),
        ("FSDP2=8", "torchtitan", "fsdp2", "zero3"),
        ("ZeRO-2", "", "deepspeed", "zero2"),
        ("ZeRO-3 + CPU AdamW offload", "", "deepspeed", "zero3"),
    ],
)
def test_sharding_tells_the_software(text, source, stack, sharding):
    layout = case_of({**SAMPLE, "sharding": text, "source": source}).layouts[0]
    assert (layout.stack.name, layout.sharding, layout.offload != "none") == (stack, sharding, "offload" in text)


def test_stated_size_tells_a_gated_layer_from_a_plain_one():
    row = {**SAMPLE, "model": "Ours", "layers": "32", "hidden": "4096", "ffn": "14336", "heads": "32", "vocab": "32000"}
    assert case_of({**row, "params_b": "8.0"}).shape.gated
    assert not case_of({**row, "params_b": "6.2"}).shape.gated
    with pytest.raises(RowError):
        case_of({**row, "params_b": "30"})


def test_micro_batch_and_interleaving_left_open_are_the_best_that_fit():
    layouts = case_of({**SAMPLE, "mbs": "", "vp": ""}).layouts
    assert {layout.micro_batch for layout in layouts} <= {1, 2, 4}
    assert len(layouts) > 1
    best = float(columns_of({**SAMPLE, "mbs": "", "vp": ""})["predicted_tokens_per_s_per_gpu"])
    assert best >= float(columns_of(SAMPLE)["predicted_tokens_per_s_per_gpu"])


def test_last_stage_is_reported_unless_the_row_is_a_maximum():
    last, most = (
        columns_of({**SAMPLE, "mem_metric": "last rank"}),
        columns_of({**SAMPLE, "mem_metric": "max over ranks"}),
    )
    assert last["predicted_peak_gib"] != last["predicted_worst_stage_peak_gib"]
    assert (
        most["predicted_peak_gib"] == most["predicted_worst_stage_peak_gib"] == last["predicted_worst_stage_peak_gib"]
    )


def test_file_is_written_back_with_its_columns_and_predicting_twice_changes_nothing(tmp_path, capsys):
    source, once, twice = (tmp_path / name for name in ("in.csv", "once.csv", "twice.csv"))
    with source.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*SAMPLE, "comment"])
        writer.writeheader()
        writer.writerows([{**SAMPLE, "comment": "a, b"}, {**SAMPLE, "gpu": "MI300X"}])
    assert main(["rows", str(source), str(once)]) == 0
    assert "1 of 2 rows predicted" in capsys.readouterr().out
    assert main(["rows", str(once), str(twice)]) == 0
    assert once.read_text() == twice.read_text()
    with once.open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert good["comment"] == "a, b"
    assert good["reason"] == "" != bad["reason"]


def test_missing_file_is_named(tmp_path, capsys):
    assert main(["rows", str(tmp_path / "absent.csv"), str(tmp_path / "out.csv")]) == 2
    assert "absent.csv: No such file" in capsys.readouterr().err


def test_planner_imports_nothing_but_the_standard_library_and_itself():
    allowed = {
        "__future__",
        "argparse",
        "collections",
        "csv",
        "dataclasses",
        "functools",
        "heapq",
        "itertools",
        "math",
        "pathlib",
        "re",
        "sys",
        "time",
    }
    allowed |= {"typing", "parallel", "conf"}
    for path in Path(parallel.plan.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name
