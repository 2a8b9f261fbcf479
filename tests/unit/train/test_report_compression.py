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
        "num_parameters": 8000 * hidden_size,
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
