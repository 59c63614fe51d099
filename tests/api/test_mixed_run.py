"""`maveriq.run` on emulated engines of a cluster with two kinds of GPU."""

from pathlib import Path

import maveriq


def test_emulated_engines_run_on_the_kind_that_was_chosen(tmp_path: Path) -> None:
    trace, models, gpus = (tmp_path / name for name in ("requests.csv", "models.toml", "gpus.toml"))
    trace.write_text("arrival_s,endpoint,prompt_tokens,output_tokens\n30,1,40,20\n31,1,200,20\n", encoding="utf-8")
    models.write_text('name = "one"\n\n[[models]]\nmodel = "llama-3.2-1b"\nload_at = 0\n', encoding="utf-8")
    gpus.write_text('name = "two"\n[[nodes]]\ngpu = "L4"\ncount = 1\n[[nodes]]\ngpu = "H100"\ncount = 1\n')
    options = {"trace": trace, "models": models, "gpus": gpus, "load_s": 5, "intent": "min-latency"}
    run = maveriq.run(backend="emulated", time_scale=0.05, out=tmp_path / "run", **options)
    (deployment,) = run.record.deployments
    assert deployment.plan is not None
    assert (deployment.plan.configuration.gpu, deployment.plan.gpu_ids) == ("H100-SXM", (1,))
    assert len(run.requests) == 2
    assert maveriq.load_run(tmp_path / "run").record.deployments == run.record.deployments
