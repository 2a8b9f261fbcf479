"""The record of a run: one JSON object a line in `metrics.jsonl`. Everything else (screen, W&B, report) reads this file.

Every record has `kind` and `time` (unix seconds). Written by the driver (D) or by rank 0 (R):

    run_started (D)    run, recipe, scale, machine, world_size, mesh, restarts
    stage_started (R)  stage, stage_kind, num_parameters, num_steps, step (first to run, 0-based), tokens_per_step
    step (R)           stage, step (completed steps, 1-based), num_steps, loss, learning_rate, grad_norm, tokens (of the
                       stage so far), step_seconds, tokens_per_second, model_tflops (a rank), mfu (or null),
                       memory_bytes (a rank's peak), metrics {name: mean}
    validation (R)     stage, step, source, loss, standard_error, accuracy, num_tokens
    checkpoint (R)     stage, step, path, num_bytes, seconds_blocked, seconds
    evaluation (R/D)   stage, model, source, loss, standard_error, accuracy, accuracy_standard_error, num_tokens,
                       num_documents        (model is a stage's name, `init`, or a baseline such as `bigram`)
    comparison (R/D)   stage, model, baseline, source, gain (nats a token, positive is better), standard_error
    export (R)         stage, path, num_bytes
    stage_ended (R)    stage, seconds
    message (D/R)      level (info, warning, error), text
    run_ended (D)      status (finished, stopped, failed), exit_code, seconds

Losses are nats a token, standard errors are over documents. Losses are written with all their digits: two runs that
should be equal can be compared to the last bit.
"""
