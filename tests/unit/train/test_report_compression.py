"""What a report says of smaller models."""

from train.console import make_console, print_results
from train.report_compression import compression_sections
from train.summary import summarise


def candidate(hidden_size, loss, **fields):
    return {
        "kind": "candidate",
        "stage": "prune",
        "num_layers": 4,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "num_experts": 1,
        "num_parameters": 8000 * hidden_size,
        "num_active_parameters": 8000 * hidden_size,
        "size_ratio": hidden_size / 128,
        "importance_kept": 0.8,
        "loss": loss,
        "standard_error": 0.05,
        "seconds": 0.5,
        **fields,
    }


def target(name, value, met):
    return {
        "kind": "target",
        "stage": "evaluate",
        "name": name,
        "model": "recover",
        "baseline": "continued",
        "source": "business",
        "value": value,
        "standard_error": 0.004,
        "limit": 0.98,
        "met": met,
    }


def rounded(part, cost, kept=False):
    return {
        "kind": "quantisation",
        "stage": "quantise",
        "scheme": "w8a8",
        "part": part,
        "cost": cost,
        "standard_error": 0.0004,
        "agreement": 0.991,
        "kept": kept,
    }


RECORDS = [
    candidate(128, 2.0),
    candidate(88, 3.9),
    candidate(104, 3.4),
    candidate(96, 3.5),
    target("pruning", 0.948, False),
    target("INT8", 0.999, True),
    rounded("layer 0", 0.001),
    rounded("layer 1", 0.2, kept=True),
    rounded("all", 0.002),
]


def test_the_shape_with_the_lowest_loss_is_the_one_taken_and_not_the_unpruned_model():
    page = "".join(compression_sections(summarise(RECORDS)))
    rows = [row for row in page.split("<tr") if "4 layers x" in row]
    assert [("taken" in row, "unpruned" in row) for row in rows] == [
        (False, True),
        (False, False),
        (True, False),
        (False, False),
    ]


def test_a_promise_that_is_not_kept_is_said_with_what_was_reached():
    page = "".join(compression_sections(summarise(RECORDS)))
    assert "94.8 ± 0.4 %" in page and page.count("not met") == 1 and "99.9 ± 0.4 %" in page


def test_variants_stand_side_by_side_with_size_accuracy_and_speed():
    def variant(model, size):
        fields = {"num_parameters": size, "weight_bytes": 4 * size, "prefill_tokens_per_second": 5e9 / size}
        return {"kind": "variant", "stage": "evaluate", "model": model, **fields}

    page = "".join(compression_sections(summarise([variant("specialise", 1_000_000), variant("recover", 700_000)])))
    assert "700K" in page and "2.7 MiB" in page and "tokens/s" in page


def test_exported_models_stand_there_with_how_fast_they_read_and_write():
    seconds = {"low": 0.009, "median": 0.010, "high": 0.0125}
    speed = {
        "kind": "speed",
        "stage": "export",
        "model": "recover",
        "device": "cpu",
        "prompt_tokens": 100,
        "prefill_seconds": seconds,
        "decode_seconds": seconds,
        "memory_bytes": 3 * 2**20,
        "disk_bytes": 2**20,
    }
    variants = [
        {
            "kind": "variant",
            "stage": "evaluate",
            "model": model,
            "num_parameters": 10,
            "weight_bytes": 40,
            "prefill_tokens_per_second": 5.0,
        }
        for model in ("recover", "continued")
    ]
    *_, page = compression_sections(summarise([*variants, speed]))
    (row,) = [row for row in page.split("<tr") if "recover" in row]
    assert "3.0 MiB" in row and "10K (8,000 to 11.1K) tokens/s" in row and "100 (80 to 111) tokens/s" in row
    assert "a prompt of 100 tokens" in page


def test_tasks_stand_side_by_side_with_their_errors():
    def task(model, metric, value):
        return {
            "kind": "task",
            "model": model,
            "task": "HumanEval",
            "metric": metric,
            "value": value,
            "standard_error": 0.031,
            "num_problems": 164,
        }

    records = [task("recover", "pass@1", 0.5), task("recover", "pass@1", 0.25), task("quantise", "pass@10", 0.75)]
    page = "".join(compression_sections(summarise(records)))
    assert "HumanEval: pass@1 of 164" in page and "HumanEval: pass@10 of 164" in page
    (row,) = [row for row in page.split("<tr") if "recover" in row]
    assert "0.25" in row and "0.031" in row and "0.75" not in row, "the newest counts"


def test_a_promise_that_was_not_measured_is_neither_met_nor_missed(capsys):
    records = [target("INT8: speed", float("nan"), False)]
    page = "".join(compression_sections(summarise(records)))
    assert "not measured" in page and "not met" not in page
    print_results(make_console(), summarise(records), {})
    said = capsys.readouterr().out
    assert "not measured" in said and "not met" not in said


def test_a_layer_left_in_higher_precision_is_named():
    (row,) = [row for row in "".join(compression_sections(summarise(RECORDS))).split("<tr") if "layer 1" in row]
    assert "kept in higher precision" in row


def test_the_newest_record_of_a_resumed_stage_counts():
    summary = summarise([*RECORDS, candidate(104, 3.2), target("pruning", 0.99, True)])
    assert len(summary.candidates) == 4 and min(each["loss"] for each in summary.candidates[1:]) == 3.2
    assert all(each["met"] for each in summary.targets)


def test_a_run_without_smaller_models_has_no_such_section():
    assert list(compression_sections(summarise([]))) == []


def test_the_screen_says_so_too(capsys):
    print_results(make_console(), summarise(RECORDS), {})
    said = capsys.readouterr().out
    assert "94.8 ± 0.4 %" in said and "not met" in said
